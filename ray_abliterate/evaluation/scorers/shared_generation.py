"""Shares one generation among the scorers of a trial that ask for the same answers.

A scorer that needs whole answers says so (`whole_answers`): another one that would end them early
then lets them be completed, and both read what is generated once. A trial that is lost ends all the
same. A scorer may take each answer while others are still being generated (`on_answer`). One that
needs only the logits of first tokens (`first_logits_of`) gets them from the answers' own pass over
the prompts, if those are answered before. Knows nothing about edits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.text_model import Answer, AnswerObserver, TextModel

GenerationRequest = tuple[tuple[Prompt, ...], int]
"""Prompts, and the most tokens of an answer."""


@runtime_checkable
class WholeAnswerScorer(Protocol):
    """A scorer that reads answers to their ends."""

    @property
    def whole_answers(self) -> GenerationRequest:
        """Return the answers that it will ask for."""


@runtime_checkable
class EagerAnswerScorer(WholeAnswerScorer, Protocol):
    """A scorer that can begin with one answer before the others are generated."""

    def on_answer(self, prompt: Prompt, answer: Answer) -> None:
        """Take an answer that is complete.

        It will be asked for with all others, unless the trial is lost.
        """


@runtime_checkable
class FirstLogitsScorer(Protocol):
    """A scorer that looks at how answers begin, and needs no answers."""

    @property
    def first_logits_of(self) -> tuple[Prompt, ...]:
        """Return the prompts whose first logits it will ask for."""


def share_generation(scorers: Iterable[Any], model: TextModel) -> TextModel:
    """Return the model as the scorers of one trial see it; itself if there is nothing to share."""
    scorers = tuple(scorers)
    sharers = [s for s in scorers if isinstance(s, WholeAnswerScorer | FirstLogitsScorer)]
    return _SharedGeneration(model, sharers) if sharers else model


class _GenerationObserver:
    """Hands what one generation yields to all scorers that want it."""

    def __init__(
        self,
        observer: AnswerObserver | None,
        whole: bool,
        prompts: Sequence[Prompt],
        listeners: Sequence[EagerAnswerScorer],
        logits: dict[int, Tensor] | None,
    ) -> None:
        """
        Args:
            observer: The observer of the scorer that asks, if any.
            whole: Single answers are not ended early, though the whole generation may be.
            prompts: What is answered.
            listeners: Scorers that take each answer.
            logits: Receives the logits of first tokens by prompt; None if nobody needs them.
        """
        self._observer, self._whole, self._prompts = observer, whole, prompts
        self._listeners, self._logits = listeners, logits

    def begin(self, index: int) -> None:
        """Pass on that the answer to prompt `index` begins."""
        if self._observer is not None:
            self._observer.begin(index)

    def read(self, index: int, text: str) -> bool:
        """Pass on new text; return whether the answer may end here."""
        decided = self._observer is not None and self._observer.read(index, text)
        return decided and not self._whole

    def enough(self) -> bool:
        """Return whether the scorer that asks needs no more of any answer."""
        return self._observer is not None and self._observer.enough()

    def opened(self, index: int, logits: Tensor) -> None:
        """Store the logits of a first token, `"vocab"`, if somebody needs them."""
        if self._logits is not None:
            self._logits[index] = logits.float().cpu()

    def ended(self, index: int, answer: Answer) -> None:
        """Hand a complete answer to the scorers that want it early."""
        for listener in self._listeners:
            listener.on_answer(self._prompts[index], answer)


class _SharedGeneration:
    """A `TextModel` that remembers answers and first logits as long as it lives: for one trial."""

    def __init__(self, model: TextModel, sharers: Sequence[Any]) -> None:
        self._model, self._sharers = model, sharers
        self._wanted = {s.whole_answers for s in sharers if isinstance(s, WholeAnswerScorer)}
        self._beginnings = {s.first_logits_of for s in sharers if isinstance(s, FirstLogitsScorer)}
        self._answers: dict[GenerationRequest, list[Answer]] = {}
        self._logits: dict[tuple[Prompt, ...], dict[int, Tensor]] = {}

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        observer: AnswerObserver | None = None,
    ) -> list[Answer]:
        """Return greedy answers, generated once for all scorers that ask for them."""
        prompts = tuple(prompts)
        request = prompts, max_new_tokens
        if request in self._answers:
            return self._answers[request]
        whole, beginnings = request in self._wanted, prompts in self._beginnings
        if not (whole or beginnings):
            return self._model.answer(prompts, max_new_tokens, observer)
        eager = [s for s in self._sharers if isinstance(s, EagerAnswerScorer)]
        listeners = [s for s in eager if s.whole_answers == request]
        logits = self._logits.setdefault(prompts, {}) if beginnings else None
        shared = _GenerationObserver(observer, whole, prompts, listeners, logits)
        answers = self._model.answer(prompts, max_new_tokens, shared)
        if whole and not shared.enough():  # otherwise they were cut short: the trial is lost
            self._answers[request] = answers
        return answers

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text; see `TextModel.tokens`."""
        return self._model.tokens(text)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return logits `"prompt vocab"`, from the answers' own pass if it has been made."""
        self._beginnings.discard(tuple(prompts))
        known = self._logits.get(tuple(prompts), {})
        if len(known) < len(prompts):
            return self._model.next_token_logits(prompts)
        return torch.stack([known[index] for index in range(len(prompts))])

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return the logits of each continuation, `"token vocab"`, from the model itself."""
        return self._model.continuation_logits(prompts, continuations)

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Return the token ids of greedy answers, from the model itself."""
        return self._model.continue_greedily(prompts, tokens)
