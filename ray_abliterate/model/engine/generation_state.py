"""Answers that are being written: tokens so far, who is still at it, and why the others ended.

Knows tokens and watches; nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ray_abliterate.search.score import Answer, AnswerListener, AnswerWatch


class TextReader(Protocol):
    """Turns the tokens of one answer into text."""

    def push(self, token: int) -> str:
        """The text that a token adds."""


class TextFormat(Protocol):
    """Turns tokens into text."""

    def stream(self) -> TextReader:
        """For one answer, token by token."""

    def decode(self, ids: Sequence[int]) -> str:
        """A whole answer."""


@dataclass(frozen=True)
class Written:
    """One answer: its tokens, the end token among them, and whether it was cut short."""

    tokens: list[int]
    stopped: bool


class Writing:
    """The answers of one model to a batch of prompts."""

    def __init__(
        self,
        indices: Sequence[int],
        limit: int,
        end_tokens: frozenset[int],
        watch: AnswerWatch | None,
        text: TextFormat,
    ) -> None:
        """
        Args:
            indices: What the watch calls each row.
            limit: Tokens of an answer at most.
            end_tokens: Tokens that end an answer.
            watch: May end answers early, and listen.
            text: Turns tokens into text.
        """
        self._indices, self._limit, self._ends, self._watch = indices, limit, end_tokens, watch
        self._listener = watch if isinstance(watch, AnswerListener) else None
        self._text = text
        self._readers = [text.stream() for _ in indices] if watch is not None else []
        if watch is not None:
            for index in indices:
                watch.begin(index)
        self.tokens: list[list[int]] = [[] for _ in indices]
        self._ended = [False] * len(indices)
        self._stopped = [False] * len(indices)

    def live(self) -> list[int]:
        """Rows that go on."""
        if self._watch is not None and self._watch.enough():
            for row, ended in enumerate(self._ended):
                self._stopped[row] |= not ended
            self._ended = [True] * len(self._ended)
        return [row for row, ended in enumerate(self._ended) if not ended]

    def open(self, row: int, logits: Tensor) -> None:
        """The first token of a row is chosen by these logits, `"vocab"`."""
        if self._listener is not None:
            self._listener.opened(self._indices[row], logits)

    def take(self, row: int, said: Sequence[int], draft: Sequence[int] = ()) -> bool:
        """Add what the model says as long as it is what the draft has, and the first that is not.

        Returns:
            The whole draft was right, and the row goes on.
        """
        for place, token in enumerate(said):
            self._add(row, token)
            if self._ended[row] or place >= len(draft) or token != draft[place]:
                return False
        return True

    def _add(self, row: int, token: int) -> None:
        tokens = self.tokens[row]
        tokens.append(token)
        self._ended[row] = token in self._ends or len(tokens) == self._limit
        if self._watch is None:
            return
        if self._ended[row]:
            if self._listener is not None:
                answer = Answer(self._text.decode(tokens), len(tokens), False)
                self._listener.ended(self._indices[row], answer)
            return
        text = self._readers[row].push(token)
        if text and self._watch.read(self._indices[row], text):
            self._ended[row] = self._stopped[row] = True

    def answers(self) -> list[Written]:
        """What was written."""
        return [Written(t, s) for t, s in zip(self.tokens, self._stopped, strict=True)]
