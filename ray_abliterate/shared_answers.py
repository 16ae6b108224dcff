"""One generation for all scorers of a trial that ask for the same answers.

A scorer that needs whole answers says so (`whole_answers`): another that would end them early then
lets them be written out, and what is written once is read by both. A trial that is lost ends early
all the same. Knows nothing about edits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ray_abliterate.prompts import Prompt
from ray_abliterate.scoring import Answer, AnswerWatch, TextModel

Asked = tuple[tuple[Prompt, ...], int]
"""Prompts, and tokens of an answer."""


@runtime_checkable
class ReadsWholeAnswers(Protocol):
    """A scorer that reads answers to their ends."""

    @property
    def whole_answers(self) -> Asked:
        """What it asks for."""


def sharing(scorers: Iterable[Any], model: TextModel) -> TextModel:
    """The model as the scorers of one trial see it; itself if none needs whole answers."""
    wanted = {s.whole_answers for s in scorers if isinstance(s, ReadsWholeAnswers)}
    return _Sharing(model, frozenset(wanted)) if wanted else model


class _Patient:
    """A watch that ends no single answer, but still all of them."""

    def __init__(self, watch: AnswerWatch) -> None:
        self._watch = watch

    def begin(self, index: int) -> None:
        """See `AnswerWatch`."""
        self._watch.begin(index)

    def read(self, index: int, text: str) -> bool:
        """See `AnswerWatch`."""
        self._watch.read(index, text)
        return False

    def enough(self) -> bool:
        """See `AnswerWatch`."""
        return self._watch.enough()


class _Sharing:
    """A `TextModel` that remembers whole answers for as long as it lives: one trial."""

    def __init__(self, model: TextModel, wanted: frozenset[Asked]) -> None:
        self._model, self._wanted = model, wanted
        self._known: dict[Asked, list[Answer]] = {}

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, watch: AnswerWatch | None = None
    ) -> list[Answer]:
        """See `TextModel`."""
        asked = tuple(prompts), max_new_tokens
        if asked not in self._wanted:
            return self._model.answer(prompts, max_new_tokens, watch)
        if asked not in self._known:
            patient = None if watch is None else _Patient(watch)
            found = self._model.answer(prompts, max_new_tokens, patient)
            if watch is not None and watch.enough():
                return found  # cut short: the trial is lost
            self._known[asked] = found
        return self._known[asked]

    def tokens(self, text: str) -> list[int]:
        """See `TextModel`."""
        return self._model.tokens(text)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """See `TextModel`."""
        return self._model.next_token_logits(prompts)

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """See `TextModel`."""
        return self._model.continuation_logits(prompts, continuations)

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """See `TextModel`."""
        return self._model.continue_greedily(prompts, tokens)
