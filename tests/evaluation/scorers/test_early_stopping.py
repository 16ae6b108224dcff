"""Early stopping: what it ends, what it leaves alone, and that it changes no frontier."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.early_stopping import score_all, scoring_order
from ray_abliterate.evaluation.scorers.scorer import BoundedScorer, Scorer
from ray_abliterate.recipe import Goal
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.search.score import Score, Scorecard

PLAN = Plan("global", 1.5, "row", (("mlp", Profile(1.0, 2.0, 0.5, 1.0)),))
TOTAL = 4


class Divergence:
    """Exact in one go; never below 0."""

    best = 0.0

    def __init__(self, name: str = "kl", goal: Goal = "minimize") -> None:
        self.name, self.goal = name, goal

    def prepare(self, model: Any) -> None: ...

    def score(self, model: Any) -> Score:
        model.asked.append(self.name)
        return Score(self.name, *[float(model.values[self.name])] * 3, goal=self.goal)


class Unknown(Divergence):
    """Of whose best nobody knows anything."""

    best = -math.inf


class Rate(Divergence):
    """Counts hits, one after the other."""

    def __init__(self, name: str = "rate", goal: Goal = "minimize") -> None:
        super().__init__(name, goal)

    def score(self, model: Any) -> Score:
        return self.score_until(model, lambda _loss: False)

    def score_until(self, model: Any, hopeless: Callable[[float], bool]) -> Score:
        model.asked.append(self.name)
        for hits in range(1, model.values[self.name] + 1):
            if hopeless(hits / TOTAL):
                model.hits_read = hits
                return Score(self.name, hits / TOTAL, hits / TOTAL, 1.0, self.goal, bound=True)
        value = model.values[self.name] / TOTAL
        return Score(self.name, value, value, value, self.goal)


@dataclass
class Model:
    """Says how it scores."""

    values: dict[str, Any]

    def __post_init__(self) -> None:
        self.asked: list[str] = []
        self.hits_read = 0


def scored(
    scorers: list[Scorer], thresholds: ThresholdSet | None, **values: Any
) -> tuple[Scorecard, Model]:
    model = Model(values)
    return score_all(scorers, model, thresholds), model  # type: ignore[arg-type]


# Scoring


def test_divergence_comes_before_answers_and_reports_last_and_the_card_keeps_its_order() -> None:
    scorers = [Divergence("note", "report"), Rate(), Unknown("other"), Divergence()]
    assert [s.name for s in scoring_order(scorers)] == ["other", "kl", "rate", "note"]
    card, model = scored(scorers, None, note=1, rate=2, other=3, kl=4)
    assert model.asked == ["other", "kl", "rate", "note"]
    assert [score.name for score in card.scores] == ["note", "rate", "other", "kl"]
    assert not card.pruned


def test_a_divergence_that_is_too_large_leaves_the_answers_unasked() -> None:
    scorers = [Rate(), Divergence(), Divergence("note", "report")]
    card, model = scored(scorers, ThresholdSet(((0.0, 0.4),)), rate=3, kl=0.5, note=1)
    assert model.asked == ["kl"]
    assert [(s.name, s.value, s.bound) for s in card.scores] == [
        ("rate", 0.0, True),
        ("kl", 0.5, False),
    ]


def test_answers_end_at_the_first_hit_too_many() -> None:
    scorers = [Divergence("note", "report"), Rate(), Divergence()]
    card, model = scored(scorers, ThresholdSet(((0.25, 0.4), (0.5, 0.3))), rate=4, kl=0.4, note=1)
    assert model.hits_read == 2
    assert [score.name for score in card.scores] == ["rate", "kl"]
    assert card["rate"].bound and card["rate"].value == 0.5 and card["rate"].high == 1.0
    assert card.pruned and not card["kl"].bound


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_a_trial_that_is_not_beaten_scores_as_without_thresholds(
    hits, kl, finished_hits, finished_kl
) -> None:
    scorers = [Rate(), Divergence(), Divergence("note", "report")]
    thresholds = ThresholdSet(((finished_hits / TOTAL, float(finished_kl)),))
    stopped, _ = scored(scorers, thresholds, rate=hits, kl=kl, note=1)
    complete, _ = scored(scorers, None, rate=hits, kl=kl, note=1)
    assert stopped.pruned == thresholds.beats(complete.losses)
    assert stopped.pruned or stopped == complete


def test_a_dominated_trial_that_was_scored_in_full_keeps_its_report_scores() -> None:
    """Where the last objective tells, and it can't end early, nothing is saved, nothing lost."""
    scorers = [Divergence("note", "report"), Divergence("a"), Divergence("b")]
    card, _ = scored(scorers, ThresholdSet(((1.0, 1.0),)), note=7, a=1, b=2)
    assert not card.pruned and card["note"].value == 7


def test_nothing_is_said_before_a_score_whose_best_is_unknown() -> None:
    scorers = [Unknown("other"), Divergence()]
    _, model = scored(scorers, ThresholdSet(((0.0, 0.0),)), other=5, kl=9)
    assert model.asked == ["other"]
    thresholds = ThresholdSet(((5.0, 0.0),))
    card, model = scored([Rate(), Unknown("other")], thresholds, other=4, rate=4)
    assert not card.pruned
    card, model = scored([Unknown("other")], ThresholdSet(((-0.5,),)), other=-1)
    assert not card.pruned and card["other"].value == -1


def test_a_rate_to_be_maximised_counts_downwards() -> None:
    class Gain(Divergence):
        best = 1.0

    scorers = [Gain("gain", "maximize"), Divergence()]
    thresholds = ThresholdSet(((-1.0, 0.3),))
    card, _ = scored([scorers[1], scorers[0]], ThresholdSet(((0.3, -1.0),)), gain=0.5, kl=0.5)
    assert card["gain"].value == 1.0 and card["gain"].bound and card["gain"].relation == "≤ "
    card, _ = scored(scorers, thresholds, gain=0.5, kl=0.2)
    assert not card.pruned
    card, _ = scored([scorers[1], scorers[0]], ThresholdSet(((0.3, -0.8),)), gain=0.9, kl=0.5)
    assert not card.pruned and card["gain"].value == 0.9


def test_a_score_that_is_not_its_scorers_is_an_error() -> None:
    class Renamed(Divergence):
        def score(self, model: Any) -> Score:
            return Score("other", 1, 1, 1)

    class Turned(Divergence):
        def score(self, model: Any) -> Score:
            return Score(self.name, 1, 1, 1, "maximize")

    for scorer in (Renamed(), Turned()):
        with pytest.raises(ScoreError, match="give it the scorer's name and goal"):
            scored([scorer], None)


def test_a_scorer_that_gives_up_without_need_is_an_error() -> None:
    class Lazy(Rate):
        def score_until(self, model: Any, hopeless: Callable[[float], bool]) -> Score:
            return Score(self.name, 0.25, 0.25, 1.0, bound=True)

    assert isinstance(Lazy(), BoundedScorer)
    with pytest.raises(ScoreError, match="only a bound, although"):
        scored([Lazy()], ThresholdSet(((0.25,),)))
    assert scored([Lazy()], ThresholdSet(((0.2,),)))[0].pruned


# Whole studies


def finished(number: int, kl: float, hits: int, bound: bool = False) -> Trial:
    rate = hits / TOTAL
    scores = (Score("rate", rate, rate, rate, bound=bound), Score("kl", kl, kl, kl))
    return Trial(number, PLAN, Scorecard(scores), 1.0)


def replayed(losses: list[tuple[int, int]], slots: int, chance: random.Random) -> list[Trial]:
    """A study with so many trials in flight, which start in order and end in any order.

    Each has the thresholds of when it was sent out; a trial sets one when it has ended.
    """
    trials: list[Trial] = []
    thresholds, flying, numbers = ThresholdSet(), [], list(range(len(losses)))
    while numbers or flying:
        if numbers and len(flying) < slots and (not flying or chance.random() < 0.6):
            number = numbers.pop(0)
            kl, hits = losses[number]
            order = [Rate(), Divergence()]
            card, _ = scored(order, thresholds, rate=hits, kl=kl)
            flying.append(Trial(number, PLAN, card, 1.0))
            continue
        trial = flying.pop(chance.randrange(len(flying)))
        trials.append(trial)
        if trial.scorecard is not None and not trial.pruned:
            thresholds = thresholds.including(trial.scorecard.losses)
    return trials


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, TOTAL)), max_size=25),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_stopping_never_changes_the_frontier_whatever_is_in_flight(losses, slots, chance) -> None:
    """With few different values, so that equal trials are in flight together often."""
    complete = [finished(number, kl, hits) for number, (kl, hits) in enumerate(losses)]
    trials = replayed(losses, slots, chance)
    assert len(trials) == len(complete)
    assert Frontier.of(trials) == Frontier.of(complete)
    for trial in trials:
        if trial.pruned:
            assert trial.scorecard is not None
            bounds, whole = trial.scorecard.losses, complete[trial.number].scorecard.losses  # type: ignore[union-attr]
            assert all(bound <= loss for bound, loss in zip(bounds, whole, strict=True))


@given(
    st.lists(st.tuples(st.floats(0, 3, width=32), st.integers(0, TOTAL)), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_a_resumed_study_has_the_thresholds_of_its_finished_trials(losses, chance) -> None:
    trials = replayed(losses, 2, chance)
    thresholds = ThresholdSet()
    for trial in trials:
        if not trial.pruned and trial.scorecard is not None:
            thresholds = thresholds.including(trial.scorecard.losses)
    assert set(ThresholdSet.of(trials).losses) == set(thresholds.losses)
