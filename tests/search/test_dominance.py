"""The thresholds of the dominance stop: which trials set them, and what they beat."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.frontier import Frontier, Trial, dominates
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.search.score import Score, Scorecard

PLAN = Plan("global", 1.5, "row", (("mlp", Profile(1.0, 2.0, 0.5, 1.0)),))


def points(objectives: int) -> Any:
    return st.lists(st.tuples(*[st.integers(0, 3).map(float)] * objectives), max_size=8)


@given(st.integers(1, 3).flatmap(lambda n: st.tuples(points(n), points(n))))
def test_thresholds_beat_what_some_finished_trial_dominates(drawn: Any) -> None:
    finished, others = drawn
    thresholds = ThresholdSet()
    for losses in finished:
        thresholds = thresholds.including(losses)
    for other in others:
        assert thresholds.beats(other) == any(dominates(losses, other) for losses in finished)
    assert not any(dominates(a, b) for a in thresholds.losses for b in thresholds.losses)
    assert len(set(thresholds.losses)) == len(thresholds.losses)


def test_equal_losses_and_unknown_ones_are_not_beaten() -> None:
    thresholds = ThresholdSet(((0.5, 0.25),))
    assert not thresholds.beats((0.5, 0.25))
    assert thresholds.beats((0.5, 0.5))
    assert not thresholds.beats((9.0, -math.inf))
    assert not ThresholdSet().beats((9.0, 9.0))


def finished(number: int, kl: float, rate: float, bound: bool = False) -> Trial:
    scores = (Score("rate", rate, rate, rate, bound=bound), Score("kl", kl, kl, kl))
    return Trial(number, PLAN, Scorecard(scores), 1.0)


def test_pruned_trials_set_no_threshold_and_are_on_no_frontier() -> None:
    trials = [finished(0, 1.0, 0.5), finished(1, 0.5, 0.0, bound=True)]
    trials.append(Trial(2, PLAN, None, 1.0, "broken"))
    assert [trial.pruned for trial in trials] == [False, True, False]
    assert ThresholdSet.of(trials).losses == ((0.5, 1.0),)
    assert [member.number for member in Frontier.of(trials).members] == [0]
    assert Frontier.of(trials[1:]).members == ()


def test_the_frontier_names_a_trial_that_is_better() -> None:
    trials = [finished(0, 1.0, 0.5), finished(1, 0.5, 0.75), finished(2, 0.7, 0.75, bound=True)]
    better = Frontier.of(trials).better_than(trials[2])
    assert better is not None and better.number == 1
    assert Frontier.of(trials).better_than(trials[0]) is None
