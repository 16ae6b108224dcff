"""What a scorer is: the protocols for those that ship and for plug-ins.

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
    """Turns a model into a score. One is made for each replica, from the recipe.

    `prepare` is called once, on the unedited model; `score` once per trial, on the edited one. A
    scorer keeps no other state: the score of a plan does not depend on earlier trials.

    It may also have `best: float`, the best value that its score can possibly have. Without it, a
    trial is never stopped before this scorer has scored it.
    """

    name: str
    goal: Goal

    def prepare(self, model: TextModel) -> None:
        """Measure whatever is needed of the unedited model."""

    def score(self, model: TextModel) -> Score:
        """Score the model as it is now."""


@runtime_checkable
class BoundedScorer(Scorer, Protocol):
    """A scorer that can stop in the middle, once its score can only turn out too bad.

    `best` is the best value that the score can possibly have.
    """

    best: float

    def score_until(self, model: TextModel, hopeless: Callable[[float], bool]) -> Score:
        """Score the model, or stop and return a bound (`Score.bound`).

        Args:
            model: The model as it is now.
            hopeless: Returns whether the trial is lost if this score ends no better than a loss
                (the value, or its negative where the goal is to maximize). Once it is true, it is
                true for every larger loss.
        """


@runtime_checkable
class AnswerRecorder(Protocol):
    """A scorer that can hand out the answers behind its last score."""

    def last_answers(self) -> Sequence[tuple[Prompt, Answer, bool]]:
        """Return prompts, answers, and whether each answer shows the behaviour."""


@runtime_checkable
class BehaviourTest(Protocol):
    """A scorer that can judge each answer by itself."""

    def shows(self, model: TextModel) -> list[bool | None]:
        """Return whether the model shows the behaviour at each of the scorer's prompts.

        None stands for answers that can't be judged, among them empty and degenerate ones.
        """
