"""Several trials that ask one model the same things, answered in the same passes.

Each trial's scorers run as they would alone, in a thread of their own, on a view of the model.
When all of them wait for an answer, equal questions are put to the model as one. So any scorer
works, and one that fails or stops early does not affect the others. Knows nothing about edits.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.text_model import Answer, AnswerObserver

WorkResult = TypeVar("WorkResult")


@dataclass
class _Question:
    """What one trial asks, and the answer once it has come.

    Attributes:
        method: The model's method that answers it for several trials.
        arguments: What all trials that ask the same give it.
        observer: The trial's own observer of answers.
    """

    method: Callable[..., Any]
    arguments: tuple[Any, ...]
    observer: AnswerObserver | None
    answered: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: BaseException | None = None


class SharedPasses(Generic[WorkResult]):
    """Runs the work of several trials side by side on one model."""

    def __init__(self, model: LanguageModel) -> None:
        """Run nothing yet.

        Args:
            model: The model that all trials ask.
        """
        self.model = model
        self._waiting: dict[int, _Question] = {}
        self._running = 0
        self._changed = threading.Condition()

    def run(self, works: Sequence[Callable[[Any], WorkResult]]) -> list[WorkResult | Exception]:
        """Do each piece of work on its own view of the model.

        Returns:
            The result of each, or the error that it raised.
        """
        results: list[WorkResult | Exception] = [RuntimeError("not run")] * len(works)

        def work(number: int) -> None:
            try:
                results[number] = works[number](_TrialView(self, number))
            except Exception as error:  # noqa: BLE001  # returned to the caller, trial by trial
                results[number] = error
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        self._running = len(works)
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(works))]
        for thread in threads:
            thread.start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) == self._running)
                if not self._running:
                    break
                asked, self._waiting = self._waiting, {}
                self._answer(asked)
        for thread in threads:
            thread.join()
        return results

    def ask(
        self,
        number: int,
        method: Callable[..., Any],
        arguments: tuple[Any, ...],
        observer: AnswerObserver | None = None,
    ) -> Any:
        """Ask for one trial, and wait until all others ask too, or are done.

        Args:
            number: Of the trial.
            method: The model's method that answers it for several trials.
            arguments: Of the method; equal questions are answered in one call.
            observer: The trial's own observer of answers.

        Returns:
            The part of the method's result that is this trial's.
        """
        question = _Question(method, arguments, observer)
        with self._changed:
            self._waiting[number] = question
            self._changed.notify_all()
        question.answered.wait()
        if question.error is not None:
            raise question.error
        return question.answer

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text; a tokenizer serves one thread at a time."""
        with self._changed:
            return self.model.tokens(text)

    def _answer(self, asked: dict[int, _Question]) -> None:
        """Answer equal questions in one call, in the order of their trials."""
        unanswered = dict(sorted(asked.items()))
        while unanswered:
            first = next(iter(unanswered.values()))
            same = {
                number: question
                for number, question in unanswered.items()
                if (question.method, question.arguments) == (first.method, first.arguments)
            }
            unanswered = {n: q for n, q in unanswered.items() if n not in same}
            questions = list(same.values())
            try:
                observers = [question.observer for question in questions]
                answers = first.method(*first.arguments, observers, tuple(same))
                for question, answer in zip(questions, answers, strict=True):
                    question.answer = answer
            except Exception as error:  # noqa: BLE001  # raised again where it was asked
                for question in questions:
                    question.error = error
            for question in questions:
                question.answered.set()


class _TrialView:
    """The model as one trial sees it: a `TextModel` that waits for the other trials."""

    def __init__(self, passes: SharedPasses[Any], number: int) -> None:
        self._passes, self._number = passes, number

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text; see `TextModel`."""
        return self._passes.tokens(text)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Return the logits after each prompt; see `TextModel`."""
        logits: list[torch.Tensor] = self._passes.ask(
            self._number, self._passes.model.logits_by_edit, (tuple(prompts), None)
        )
        return torch.stack([own[0] for own in logits])  # (prompt, vocab)

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Return the logits that predict each continuation; see `TextModel`."""
        given = tuple(map(tuple, continuations))
        logits: list[torch.Tensor] = self._passes.ask(
            self._number, self._passes.model.logits_by_edit, (tuple(prompts), given)
        )
        return logits

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Return the token ids of the greedy answers; see `TextModel`."""
        answers = self._passes.ask(
            self._number, self._passes.model.tokens_by_edit, (tuple(prompts), tokens)
        )
        return [answer.tokens for answer in answers]

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        """Return the greedy answers; see `TextModel`."""
        answers: list[Answer] = self._passes.ask(
            self._number,
            self._passes.model.answers_by_edit,
            (tuple(prompts), max_new_tokens),
            observer,
        )
        return answers
