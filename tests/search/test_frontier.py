"""Trials, their frontier, and the volume it covers."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.search.frontier import Frontier, Trial, dominates, weakly_dominates
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.search.score import Score, Scorecard

PLAN = Plan("global", 1.5, "row", (("mlp", Profile(1.0, 2.0, 0.5, 1.0)),))


def finished(number: int, *values: float) -> Trial:
    scores = tuple(Score(f"s{i}", *[float(v)] * 3) for i, v in enumerate(values))
    return Trial(number, PLAN, Scorecard(scores), 1.0)


def failed(number: int) -> Trial:
    return Trial(number, PLAN, None, 1.0, error="out of memory")


def trial_lists(objectives: int, size: int = 12) -> st.SearchStrategy[list[Trial]]:
    point = st.tuples(*[st.integers(0, 5)] * objectives) | st.none()
    return st.lists(point, max_size=size).map(
        lambda points: [
            failed(n) if values is None else finished(n, *values) for n, values in enumerate(points)
        ]
    )


TRIALS = st.integers(1, 3).flatmap(trial_lists)


# Trials


@pytest.mark.parametrize("trial", [finished(3, 0.25, 1e-7), failed(4)])
def test_a_trial_survives_json_in_one_line(trial):
    assert Trial.from_json(trial.to_json()) == trial
    assert "\n" not in trial.to_json()


def test_an_error_of_several_lines_stays_one_line_of_json():
    trial = Trial(1, PLAN, None, 0.5, error='first\nsecond "quoted" Käse\u2028end')
    assert "\n" not in trial.to_json()
    assert Trial.from_json(trial.to_json()) == trial


def test_a_trial_has_either_a_scorecard_or_an_error():
    with pytest.raises(ValueError, match="either"):
        Trial(1, PLAN, None, 1.0)
    with pytest.raises(ValueError, match="either"):
        Trial(1, PLAN, finished(1, 1.0).scorecard, 1.0, error="and yet")


# The frontier


@given(TRIALS)
def test_no_member_of_a_frontier_dominates_another(trials):
    members = [member.losses for member in Frontier.of(trials).members]
    assert not any(dominates(a, b) for a, b in itertools.permutations(members, 2))
    assert len(set(members)) == len(members)


@given(TRIALS)
def test_a_member_is_at_least_as_good_as_each_finished_trial_and_none_failed(trials):
    members = Frontier.of(trials).members
    assert all(member.scorecard is not None for member in members)
    for trial in trials:
        if trial.scorecard is not None:
            assert any(weakly_dominates(member.losses, trial.losses) for member in members)


@given(TRIALS)
def test_of_trials_with_equal_losses_the_earliest_is_a_member(trials):
    earliest: dict[tuple[float, ...], int] = {}
    for trial in trials:
        if trial.scorecard is not None:
            earliest.setdefault(trial.losses, trial.number)
    for member in Frontier.of(trials).members:
        assert member.number == earliest[member.losses]


@given(TRIALS, st.randoms(use_true_random=False))
def test_a_frontier_does_not_depend_on_the_order_of_trials(trials, chance: random.Random):
    shuffled = list(trials)
    chance.shuffle(shuffled)
    assert Frontier.of(shuffled) == Frontier.of(trials)


@given(TRIALS)
def test_a_frontiers_frontier_is_itself(trials):
    frontier = Frontier.of(trials)
    assert Frontier.of(frontier.members) == frontier
    assert len(frontier) == len(frontier.members)
    assert bool(frontier) == any(trial.scorecard for trial in trials)


@given(TRIALS)
def test_members_come_in_order_of_the_first_objective(trials):
    members = Frontier.of(trials).members
    keys = [member.losses for member in members]
    assert keys == sorted(keys)


def test_a_score_to_maximize_counts_upwards():
    def trial(number: int, loss: float, gain: float) -> Trial:
        scores = (
            Score("l", *[float(loss)] * 3),
            Score("g", *[float(gain)] * 3, goal="maximize"),
        )
        return Trial(number, PLAN, Scorecard(scores), 1.0)

    trials = [trial(0, 1, 5), trial(1, 1, 9), trial(2, 2, 8), trial(3, 3, 10)]
    assert [member.number for member in Frontier.of(trials).members] == [1, 3]


# The knee


@given(TRIALS)
def test_the_knee_is_a_member(trials):
    frontier = Frontier.of(trials)
    if frontier:
        assert frontier.knee in frontier.members
    else:
        with pytest.raises(ValueError, match="no trial finished"):
            _ = frontier.knee


def test_the_knee_is_near_the_best_of_both_whatever_the_units():
    for unit in (1e-6, 1.0, 1e6):
        trials = [finished(0, 0, 10 * unit), finished(1, 2, 2 * unit), finished(2, 10, 0)]
        assert Frontier.of(trials).knee.number == 1


# The hypervolume


def test_the_hypervolume_of_a_staircase_is_known():
    trials = [finished(0, 1, 3), finished(1, 2, 2), finished(2, 3, 1), finished(3, 3, 3)]
    assert Frontier.of(trials).hypervolume((4.0, 4.0)) == 6.0
    assert Frontier.of(trials).hypervolume((1.0, 1.0)) == 0.0
    assert Frontier.of([]).hypervolume((4.0, 4.0)) == 0.0


@pytest.mark.parametrize("objectives", [1, 2, 3])
@given(data=st.data())
def test_the_hypervolume_of_integer_points_is_the_number_of_covered_cells(objectives, data):
    trials = data.draw(trial_lists(objectives))
    reference = data.draw(st.tuples(*[st.integers(0, 6)] * objectives))
    points = [trial.losses for trial in trials if trial.scorecard is not None]
    edge = tuple(float(value) for value in reference)
    cells = itertools.product(*[range(size) for size in reference])
    covered = sum(
        any(weakly_dominates(point, [float(x) for x in cell]) for point in points) for cell in cells
    )
    assert Frontier.of(trials).hypervolume(edge) == covered


@given(trial_lists(3), st.integers(0, 12))
def test_the_hypervolume_never_falls_when_trials_are_added(trials, count):
    reference = (6.0, 6.0, 6.0)
    before = Frontier.of(trials[:count]).hypervolume(reference)
    assert Frontier.of(trials).hypervolume(reference) >= before
