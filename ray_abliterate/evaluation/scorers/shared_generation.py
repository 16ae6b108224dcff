"""One generation for all scorers of a trial that ask for the same answers, or their beginnings.

A scorer that needs whole answers says so (`whole_answers`): another that would end them early then
lets them be written out, and what is written once is read by both. A trial that is lost ends early
all the same. A scorer may listen (`hears`), and is told each answer while others are still written.
One that needs only the logits of first tokens (`first_logits_of`) gets them from the answers' own
pass over the prompts, where answers were written before. Knows nothing about edits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.text_model import Answer, AnswerObserver, TextModel

GenerationRequest = tuple[tuple[Prompt, ...], int]
"""Prompts, and tokens of an answer."""


@runtime_checkable
class ReadsWholeAnswers(Protocol):
    """A scorer that reads answers to their ends."""

    @property
    def whole_answers(self) -> GenerationRequest:
        """What it asks for."""


@runtime_checkable
class HearsAnswers(ReadsWholeAnswers, Protocol):
    """One that can begin with an answer before the others are written."""

    def hears(self, prompt: Prompt, answer: Answer) -> None:
        """An answer is whole; it will be asked for with all others, unless the trial is lost."""


@runtime_checkable
class ReadsFirstLogits(Protocol):
    """A scorer that looks at how answers begin, and needs none."""

    @property
    def first_logits_of(self) -> tuple[Prompt, ...]:
        """The prompts."""


def share_generation(scorers: Iterable[Any], model: TextModel) -> TextModel:
    """The model as the scorers of one trial see it; itself if there is nothing to share."""
    scorers = tuple(scorers)
    sharers = [s for s in scorers if isinstance(s, ReadsWholeAnswers | ReadsFirstLogits)]
    return _Sharing(model, sharers) if sharers else model


class _Listening:
    """Hands what comes of one generation to all that want it."""

    def __init__(
        self,
        watch: AnswerObserver | None,
        whole: bool,
        prompts: Sequence[Prompt],
        listeners: Sequence[HearsAnswers],
        logits: dict[int, Tensor] | None,
    ) -> None:
        """
        Args:
            watch: The asking scorer's.
            whole: It ends no single answer, but still all of them.
            prompts: What is answered.
            listeners: Scorers that are told each answer.
            logits: Takes the logits of first tokens, if somebody needs them.
        """
        self._watch, self._whole, self._prompts = watch, whole, prompts
        self._listeners, self._logits = listeners, logits

    def begin(self, index: int) -> None:
        """See `AnswerObserver`."""
        if self._watch is not None:
            self._watch.begin(index)

    def read(self, index: int, text: str) -> bool:
        """See `AnswerObserver`."""
        decided = self._watch is not None and self._watch.read(index, text)
        return decided and not self._whole

    def enough(self) -> bool:
        """See `AnswerObserver`."""
        return self._watch is not None and self._watch.enough()

    def opened(self, index: int, logits: Tensor) -> None:
        """See `AnswerListener`."""
        if self._logits is not None:
            self._logits[index] = logits.float().cpu()

    def ended(self, index: int, answer: Answer) -> None:
        """See `AnswerListener`."""
        for listener in self._listeners:
            listener.hears(self._prompts[index], answer)


class _Sharing:
    """A `TextModel` that remembers answers and first logits for as long as it lives: one trial."""

    def __init__(self, model: TextModel, sharers: Sequence[Any]) -> None:
        self._model, self._sharers = model, sharers
        self._wanted = {s.whole_answers for s in sharers if isinstance(s, ReadsWholeAnswers)}
        self._beginnings = {s.first_logits_of for s in sharers if isinstance(s, ReadsFirstLogits)}
        self._answers: dict[GenerationRequest, list[Answer]] = {}
        self._logits: dict[tuple[Prompt, ...], dict[int, Tensor]] = {}

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, watch: AnswerObserver | None = None
    ) -> list[Answer]:
        """See `TextModel`."""
        prompts = tuple(prompts)
        asked = prompts, max_new_tokens
        if asked in self._answers:
            return self._answers[asked]
        whole, beginnings = asked in self._wanted, prompts in self._beginnings
        if not (whole or beginnings):
            return self._model.answer(prompts, max_new_tokens, watch)
        hearing = [s for s in self._sharers if isinstance(s, HearsAnswers)]
        listeners = [s for s in hearing if s.whole_answers == asked]
        logits = self._logits.setdefault(prompts, {}) if beginnings else None
        listening = _Listening(watch, whole, prompts, listeners, logits)
        found = self._model.answer(prompts, max_new_tokens, listening)
        if whole and not listening.enough():  # else cut short: the trial is lost
            self._answers[asked] = found
        return found

    def tokens(self, text: str) -> list[int]:
        """See `TextModel`."""
        return self._model.tokens(text)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """See `TextModel`."""
        self._beginnings.discard(tuple(prompts))
        known = self._logits.get(tuple(prompts), {})
        if len(known) < len(prompts):
            return self._model.next_token_logits(prompts)
        return torch.stack([known[index] for index in range(len(prompts))])

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """See `TextModel`."""
        return self._model.continuation_logits(prompts, continuations)

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """See `TextModel`."""
        return self._model.continue_greedily(prompts, tokens)
