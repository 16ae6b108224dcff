"""What a scorer or a suite asks of a model: answers, logits, and observers of answers in progress.

Protocols and one value; knows nothing about how a model computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ray_abliterate.data.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object


@dataclass(frozen=True)
class Answer:
    """What a model wrote in answer to one prompt.

    Attributes:
        text: New text only, special tokens left out.
        tokens: New tokens that were generated, the end token included.
        stopped: Whether generation was stopped before the model ended the answer, because nothing
            could change the verdict any more.
    """

    text: str
    tokens: int
    stopped: bool


@runtime_checkable
class AnswerObserver(Protocol):
    """Follows answers while they are written, and ends those whose verdict is decided."""

    def begin(self, index: int) -> None:
        """Expect the answer to prompt `index` from its beginning.

        It may begin again, after memory ran out; what was read of it then no longer counts.
        """

    def read(self, index: int, text: str) -> bool:
        """Read `text`, which was added to the answer to prompt `index`.

        Returns:
            Whether the answer's verdict can't change any more.
        """

    def enough(self) -> bool:
        """Return whether no answer needs to go on, because what has been read decides.

        This is asked between steps.
        """


@runtime_checkable
class AnswerListener(AnswerObserver, Protocol):
    """An observer that also learns what each answer begins with, and how it ended.

    Where a model doesn't know (`opened` in transformers' own generation, say), it is not called.
    """

    def opened(self, index: int, logits: "Tensor") -> None:
        """Receive the raw logits that choose the answer's first token, `"vocab"`.

        They come again if the answer to prompt `index` begins again.
        """

    def ended(self, index: int, answer: Answer) -> None:
        """Receive the whole answer to prompt `index`, while others may still be written.

        It is not called for answers that were stopped.
        """


@runtime_checkable
class TextModel(Protocol):
    """What scorers ask of a model; `language_model.LanguageModel` is the one that ships."""

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text as an answer begins with it; no special tokens."""

    def next_token_logits(self, prompts: Sequence[Prompt]) -> "Tensor":
        """Return the logits after each prompt, float32, `"prompt vocab"`."""

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> "list[Tensor]":
        """Return for each prompt the logits that predict its continuation, `"token vocab"`."""

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Return the token ids of the greedy answers, up to and with the end token."""

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        observer: AnswerObserver | None = None,
    ) -> list[Answer]:
        """Return the greedy answers.

        Args:
            prompts: The prompts.
            max_new_tokens: The most tokens of an answer.
            observer: Follows the answers, and may end them early.
        """
