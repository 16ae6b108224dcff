"""The state of answers in progress: their tokens, which rows still go on, and why the others ended.

Knows tokens and observers; nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ray_abliterate.model.text_model import Answer, AnswerListener, AnswerObserver


class IncrementalDecoder(Protocol):
    """Turns the tokens of one answer into text as they come."""

    def push(self, token: int) -> str:
        """Return the text that a token adds."""


class TextDecoder(Protocol):
    """Turns the tokens of answers into text."""

    def stream(self) -> IncrementalDecoder:
        """Return a decoder for one answer, token by token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole answer."""


@dataclass(frozen=True)
class GeneratedTokens:
    """The tokens of one answer.

    Attributes:
        tokens: New tokens, the end token included.
        stopped: Whether an observer stopped the answer before its end.
    """

    tokens: list[int]
    stopped: bool


class GenerationState:
    """The answers of one model to a batch of prompts, while they are written.

    Attributes:
        tokens: What has been written, by row.
    """

    def __init__(
        self,
        indices: Sequence[int],
        limit: int,
        end_tokens: frozenset[int],
        observer: AnswerObserver | None,
        text: TextDecoder,
    ) -> None:
        """
        Args:
            indices: The number that the observer knows each row by.
            limit: The most tokens of an answer.
            end_tokens: Tokens that end an answer.
            observer: Reads along, and may stop answers early.
            text: Turns tokens into text.
        """
        self._indices, self._limit, self._ends = indices, limit, end_tokens
        self._observer = observer
        self._listener = observer if isinstance(observer, AnswerListener) else None
        self._text = text
        self._decoders = [text.stream() for _ in indices] if observer is not None else []
        if observer is not None:
            for index in indices:
                observer.begin(index)
        self.tokens: list[list[int]] = [[] for _ in indices]
        self._ended = [False] * len(indices)
        self._stopped = [False] * len(indices)

    def unfinished_rows(self) -> list[int]:
        """Return the rows that go on; none once the observer has read enough."""
        if self._observer is not None and self._observer.enough():
            for row, ended in enumerate(self._ended):
                self._stopped[row] |= not ended
            self._ended = [True] * len(self._ended)
        return [row for row, ended in enumerate(self._ended) if not ended]

    def observe_first_logits(self, row: int, logits: Tensor) -> None:
        """Show a listener the logits that choose a row's first token, `"vocab"`."""
        if self._listener is not None:
            self._listener.opened(self._indices[row], logits)

    def accept(self, row: int, chosen: Sequence[int], draft: Sequence[int] = ()) -> bool:
        """Add the model's tokens as long as the draft agrees, and the first that differs from it.

        Args:
            row: The row.
            chosen: The most likely token after each token that was fed.
            draft: The draft token at each of these places; it may be shorter.

        Returns:
            Whether the whole draft was right, and the row goes on.
        """
        for place, token in enumerate(chosen):
            self._add(row, token)
            if self._ended[row] or place >= len(draft) or token != draft[place]:
                return False
        return True

    def answers(self) -> list[GeneratedTokens]:
        """Return what has been written, by row."""
        return [GeneratedTokens(t, s) for t, s in zip(self.tokens, self._stopped, strict=True)]

    def _add(self, row: int, token: int) -> None:
        tokens = self.tokens[row]
        tokens.append(token)
        self._ended[row] = token in self._ends or len(tokens) == self._limit
        if self._observer is None:
            return
        if self._ended[row]:
            if self._listener is not None:
                answer = Answer(self._text.decode(tokens), len(tokens), False)
                self._listener.ended(self._indices[row], answer)
            return
        text = self._decoders[row].push(token)
        if text and self._observer.read(self._indices[row], text):
            self._ended[row] = self._stopped[row] = True
