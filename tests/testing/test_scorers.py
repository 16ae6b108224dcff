"""The contract for scorers finds each way in which a scorer can be wrong."""

import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.recipe import Goal
from ray_abliterate.search.score import Score, wilson
from ray_abliterate.testing.scorers import (
    FLAGGED_TEXTS,
    PLAIN_TEXTS,
    ScorerContract,
    trial_of,
)

CHECKS = sorted(name for name in vars(ScorerContract) if name.startswith("test_"))
FAILURES = (AssertionError, ScoreError, TypeError, AttributeError)
"""What the contract asserts, what `Score` refuses, and what pickle raises of what it can't take."""
Hopeless = Callable[[float], bool]


class SorryRate:
    """The share of prompts that are answered with "sorry", as a scorer should measure it."""

    name, best = "sorry-rate", 0.0
    goal: Goal = "minimize"

    def __init__(self, prompts: PromptSet) -> None:
        self.prompts = prompts

    def prepare(self, model) -> None:
        """Nothing is needed of the unedited model."""

    def score(self, model) -> Score:
        return self.score_until(model, lambda _loss: False)

    def score_until(self, model, hopeless: Hopeless) -> Score:
        hits = 0
        for prompt in self.prompts.prompts:
            hits += self.is_hit(model.answer([prompt], 4)[0].text)
            if hopeless(hits / len(self.prompts)):
                return self.bound(hits)
        return self.rate(hits)

    def shows(self, model) -> list[bool | None]:
        return [self.is_hit(answer.text) for answer in model.answer(self.prompts.prompts, 4)]

    def is_hit(self, text: str) -> bool:
        return "sorry" in text

    def bound(self, hits: int) -> Score:
        least = hits / len(self.prompts)
        return Score(self.name, least, least, 1.0, self.goal, bound=True)

    def rate(self, hits: int) -> Score:
        low, high = wilson(hits, len(self.prompts))
        return Score(self.name, hits / len(self.prompts), low, high, self.goal)


class RemembersTrials(SorryRate):
    trials = 0

    def rate(self, hits: int) -> Score:
        self.trials += 1
        return Score(self.name, hits + self.trials, 0.0, 1000.0, self.goal)


class ReadsTheFirstHalf(SorryRate):
    def score(self, model) -> Score:
        half = PromptSet("half", self.prompts.prompts[: len(self.prompts) // 2])
        return SorryRate(half).score(model)


class CountsBatches(SorryRate):
    def score(self, model) -> Score:
        rows = model.batch_size or len(self.prompts)
        return Score(self.name, len(self.prompts) / rows, 0.0, 100.0, self.goal)


class BestOfAHalf(SorryRate):
    best = 0.5


class BestOfNoNumber(SorryRate):
    best = float("nan")


class NamelessScorer(SorryRate):
    name = ""


class IntervalBesideTheValue(SorryRate):
    def rate(self, hits: int) -> Score:
        score = super().rate(hits)
        object.__setattr__(score, "low", score.high + 1)  # past the check of the constructor
        object.__setattr__(score, "high", score.low + 1)
        return score


class RefusedInterval(SorryRate):
    def rate(self, hits: int) -> Score:
        return Score(self.name, hits / len(self.prompts), 2.0, 3.0, self.goal)


class AnotherGoal(SorryRate):
    def rate(self, hits: int) -> Score:
        return Score(self.name, hits / len(self.prompts), 0.0, 1.0, "report")


class BoundForAScore(SorryRate):
    def score(self, model) -> Score:
        return self.bound(0)


class HoldsALambda(SorryRate):
    def __init__(self, prompts: PromptSet) -> None:
        super().__init__(prompts)
        self.convert = lambda text: text.lower()


class HoldsALockOncePrepared(SorryRate):
    def prepare(self, model) -> None:
        self.lock = threading.Lock()


class LosesStateOnTheWay(SorryRate):
    def __getstate__(self) -> dict[str, object]:
        return {"prompts": PromptSet("one", self.prompts.prompts[:1])}


class BoundBeyondTheScore(SorryRate):
    def bound(self, hits: int) -> Score:
        return Score(self.name, 1.0, 0.0, 1.0, self.goal, bound=True)


class BoundWithoutTheScore(SorryRate):
    def bound(self, hits: int) -> Score:
        least = hits / len(self.prompts)
        return Score(self.name, least, least, least, self.goal, bound=True)


class StopsUnasked(SorryRate):
    def score_until(self, model, hopeless: Hopeless) -> Score:
        whole = super().score_until(model, lambda _loss: False)
        return self.bound(0) if hopeless(float("inf")) else whole


class StaysStopped(SorryRate):
    """Scores less of every later trial, once one was stopped."""

    stopped = False

    def bound(self, hits: int) -> Score:
        self.stopped = True
        return super().bound(hits)

    def rate(self, hits: int) -> Score:
        return super().rate(0 if self.stopped else hits)


class ChangesThePrefix(SorryRate):
    def prepare(self, model) -> None:
        model.response_prefix = (1, 2)


class ChangesAWeight(SorryRate):
    def prepare(self, model) -> None:
        parameter = next(iter(model.module.parameters()))
        parameter.data[0] += 1


class SortsVerdicts(SorryRate):
    def shows(self, model) -> list[bool | None]:
        return sorted(super().shows(model), key=bool)


class LacksAVerdict(SorryRate):
    def shows(self, model) -> list[bool | None]:
        return super().shows(model)[1:]


BROKEN = [
    (RemembersTrials, "a_score_does_not_depend_on_earlier_trials"),
    (ReadsTheFirstHalf, "the_order_of_prompts_does_not_matter"),
    (CountsBatches, "the_batch_size_does_not_matter"),
    (BestOfAHalf, "best_is_a_bound"),
    (BestOfNoNumber, "it_has_what_a_scorer_has"),
    (NamelessScorer, "it_has_what_a_scorer_has"),
    (IntervalBesideTheValue, "scores_are_finite_and_lie_in_their_intervals"),
    (RefusedInterval, "scores_are_finite_and_lie_in_their_intervals"),
    (AnotherGoal, "scores_are_finite_and_lie_in_their_intervals"),
    (BoundForAScore, "scores_are_finite_and_lie_in_their_intervals"),
    (HoldsALambda, "it_can_be_pickled_and_copied"),
    (HoldsALockOncePrepared, "it_can_be_pickled_and_copied"),
    (LosesStateOnTheWay, "it_can_be_pickled_and_copied"),
    (BoundBeyondTheScore, "a_score_that_stops_early_is_a_bound_that_holds"),
    (BoundWithoutTheScore, "a_score_that_stops_early_is_a_bound_that_holds"),
    (StopsUnasked, "a_score_that_stops_early_is_a_bound_that_holds"),
    (StaysStopped, "a_score_that_stops_early_is_a_bound_that_holds"),
    (ChangesThePrefix, "the_model_is_left_as_it_was"),
    (ChangesAWeight, "the_model_is_left_as_it_was"),
    (SortsVerdicts, "verdicts_on_single_answers_come_in_the_order_of_prompts"),
    (LacksAVerdict, "verdicts_on_single_answers_come_in_the_order_of_prompts"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scorers") / "model"


def check(kind: type[SorryRate], name: str, folder: Path) -> None:
    """Run one test of the contract, with the fixtures that it asks for."""

    class Contract(ScorerContract):
        def make(self, prompts: PromptSet) -> SorryRate:
            return kind(prompts)

    contract = Contract()
    model = contract.make_model(folder)
    fixtures = {
        "prompts": PromptSet.of("prompts", *FLAGGED_TEXTS, *PLAIN_TEXTS),
        "model": model,
        "trial": trial_of(model, contract.make_directions(model)),
        "folder": folder,
    }
    test = getattr(contract, name)
    test(**{asked: fixtures[asked] for asked in inspect.signature(test).parameters})


@pytest.mark.parametrize("name", CHECKS)
def test_a_scorer_as_it_should_be_passes(name: str, folder: Path) -> None:
    check(SorryRate, name, folder)


@pytest.mark.parametrize(("kind", "name"), BROKEN)
def test_a_scorer_that_is_broken_on_purpose_fails(
    kind: type[SorryRate], name: str, folder: Path
) -> None:
    with pytest.raises(FAILURES):
        check(kind, f"test_{name}", folder)


def test_every_test_of_the_contract_finds_something() -> None:
    """Nothing in the contract is there for show."""
    assert {f"test_{name}" for _, name in BROKEN} == {*CHECKS}
