"""Several trials that ask one model the same things, answered in the same passes.

Each trial's scorers run as they would alone, in a thread of their own, on a view of the model.
When all of them wait for an answer, equal questions are put to the model as one. So any scorer
works, and one that fails or stops early leaves the others be. Knows nothing about edits.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.text_model import Answer, AnswerObserver

Result = TypeVar("Result")


@dataclass
class _Question:
    """What one trial asks, and the answer once it is there."""

    method: Callable[..., Any]
    arguments: tuple[Any, ...]
    observer: AnswerObserver | None
    answered: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: BaseException | None = None


class SharedPasses(Generic[Result]):
    """Runs the work of several trials side by side on one model."""

    def __init__(self, model: LanguageModel) -> None:
        """
        Args:
            model: The model that all trials ask.
        """
        self.model = model
        self._waiting: dict[int, _Question] = {}
        self._running = 0
        self._changed = threading.Condition()

    def run(self, works: Sequence[Callable[[Any], Result]]) -> list[Result | Exception]:
        """Do each piece of work on its own view of the model; results, or what went wrong."""
        results: list[Result | Exception] = [RuntimeError("not run")] * len(works)

        def work(number: int) -> None:
            try:
                results[number] = works[number](_View(self, number))
            except Exception as error:  # noqa: BLE001  # handed to the caller, trial by trial
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
        """Ask, and wait until everybody else asks too, or is done."""
        question = _Question(method, arguments, observer)
        with self._changed:
            self._waiting[number] = question
            self._changed.notify_all()
        question.answered.wait()
        if question.error is not None:
            raise question.error
        return question.answer

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text; a tokenizer serves one thread at a time."""
        with self._changed:
            found: list[int] = self.model.tokens(text)
            return found

    def _answer(self, asked: dict[int, _Question]) -> None:
        """Equal questions in one go, in the order of their trials."""
        left = dict(sorted(asked.items()))
        while left:
            first = next(iter(left.values()))
            same = {
                number: question
                for number, question in left.items()
                if (question.method, question.arguments) == (first.method, first.arguments)
            }
            left = {number: q for number, q in left.items() if number not in same}
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


class _View:
    """The model as one trial sees it: a `TextModel` that waits for the other trials."""

    def __init__(self, together: SharedPasses[Any], number: int) -> None:
        self._together, self._number = together, number

    def tokens(self, text: str) -> list[int]:
        """See `TextModel`."""
        return self._together.tokens(text)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """See `TextModel`."""
        found = self._together.ask(
            self._number, self._together.model.logits_by_edit, (tuple(prompts), None)
        )
        return torch.stack([logits[0] for logits in found])

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """See `TextModel`."""
        given = tuple(map(tuple, continuations))
        found: list[torch.Tensor] = self._together.ask(
            self._number, self._together.model.logits_by_edit, (tuple(prompts), given)
        )
        return found

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """See `TextModel`."""
        found = self._together.ask(
            self._number, self._together.model.tokens_by_edit, (tuple(prompts), tokens)
        )
        return [written.tokens for written in found]

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        """See `TextModel`."""
        found: list[Answer] = self._together.ask(
            self._number,
            self._together.model.answers_by_edit,
            (tuple(prompts), max_new_tokens),
            observer,
        )
        return found
