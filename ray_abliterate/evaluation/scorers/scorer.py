"""What a scorer is: protocols for those that ship and for plug-ins.

Knows nothing about models beyond `TextModel`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.text_model import Answer, TextModel
from ray_abliterate.recipe import Goal
from ray_abliterate.search.score import Score


@runtime_checkable
class Scorer(Protocol):
    """Turns a model into a score. Made once per replica, from the recipe.

    `prepare` is called once, on the untouched model; `score` once per trial, on the edited one.
    A scorer keeps no other state: the score of a plan does not depend on earlier trials.

    It may also have `best: float`, the best value that its score can possibly have, if there is
    one. Without, a trial is never stopped before this scorer has scored it.
    """

    name: str
    goal: Goal

    def prepare(self, model: TextModel) -> None:
        """Measure what is needed of the base model."""

    def score(self, model: TextModel) -> Score:
        """Score the model as it is now."""


@runtime_checkable
class BoundedScorer(Scorer, Protocol):
    """A scorer that can end in the midst of scoring, once its score can only be too bad.

    `best` is the best value that the score can possibly have.
    """

    best: float

    def score_until(self, model: TextModel, hopeless: Callable[[float], bool]) -> Score:
        """Score the model, or end with a bound (`Score.bound`).

        Args:
            model: As it is now.
            hopeless: Whether the trial is lost if this score ends no better than the given loss
                (the value, or its negative where the goal is to maximise). True stays true for
                every larger loss.
        """


@runtime_checkable
class AnswerRecorder(Protocol):
    """A scorer that can hand out the answers behind its last score."""

    def last_answers(self) -> Sequence[tuple[Prompt, Answer, bool]]:
        """Prompt, answer, and whether the answer shows the behaviour."""


@runtime_checkable
class BehaviourTest(Protocol):
    """A scorer that can tell of each answer by itself."""

    def shows(self, model: TextModel) -> list[bool | None]:
        """Whether the model shows the behaviour at each of the scorer's prompts; None where it
        can't be told, and where an answer is empty or degenerate: such say nothing."""
