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
    """What a model wrote to one prompt: new text only, special tokens left out."""

    text: str
    tokens: int
    """New tokens that were generated, the end token included."""
    stopped: bool
    """Generation ended before the model did, because nothing could change the verdict."""


@runtime_checkable
class AnswerObserver(Protocol):
    """Follows answers while they are written, and ends those that are decided."""

    def begin(self, index: int) -> None:
        """The answer to prompt `index` begins: for the first time, or again, after memory ran out
        and what was read of it no longer holds."""

    def read(self, index: int, text: str) -> bool:
        """`text` was added to the answer to prompt `index`; True: its verdict can't change."""

    def enough(self) -> bool:
        """No answer needs to go on: what has been read decides. Asked between steps."""


@runtime_checkable
class AnswerListener(AnswerObserver, Protocol):
    """A watch that is also told what each answer begins with, and what it has become.

    Where a model can't tell (`opened` by transformers' own generation, say), it doesn't.
    """

    def opened(self, index: int, logits: "Tensor") -> None:
        """Raw logits that the first token of the answer to prompt `index` is chosen by, `"vocab"`;
        again, if the answer begins again."""

    def ended(self, index: int, answer: Answer) -> None:
        """The answer to prompt `index` has come to its end, and others may still be written. Not
        told of answers that were stopped."""


@runtime_checkable
class TextModel(Protocol):
    """What scorers ask of a model; `language_model.LanguageModel` is the one that ships."""

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as an answer begins with it; no special tokens."""

    def next_token_logits(self, prompts: Sequence[Prompt]) -> "Tensor":
        """Logits after each prompt, float32, `"prompt vocab"`."""

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> "list[Tensor]":
        """For each prompt the logits that predict each continuation token, `"token vocab"`."""

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Token ids of the greedy answers, up to and with the end token."""

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        watch: AnswerObserver | None = None,
    ) -> list[Answer]:
        """Greedy answers; `watch` follows them, and may end them early."""
