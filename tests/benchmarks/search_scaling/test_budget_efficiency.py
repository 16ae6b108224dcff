"""Studies on a virtual clock: who is in flight when, and what frontiers they find."""

import pytest

from benchmarks.harness.recorded_study import recorded_points
from benchmarks.search_scaling.budget_efficiency import (
    AHEAD,
    StudyKind,
    frontier_points,
    hypervolume,
    play,
    reference_point,
)


def played(kind: StudyKind, trials: int) -> tuple[list[int], list[int], float]:
    """Most plans in flight before each ask, plans in the order of their ends, and the time."""
    in_flight: list[int] = []
    ended: list[int] = []
    number = iter(range(trials))

    def ask() -> int:
        asked = next(number)
        in_flight.append(asked - len(ended))
        return asked

    return in_flight, ended, play(ask, ended.append, trials, kind, seed=0)


@pytest.mark.parametrize(
    "kind", [StudyKind(1), StudyKind(4), StudyKind(16), StudyKind(16, pack=4), StudyKind(64)]
)
def test_every_plan_ends_once_and_no_more_are_in_flight_than_may_be(kind: StudyKind) -> None:
    in_flight, ended, _ = played(kind, 50)
    assert sorted(ended) == list(range(50))
    assert max(in_flight) < kind.concurrency + AHEAD


def test_one_replica_takes_plans_in_turn_and_sixteen_take_a_sixteenth_of_the_time() -> None:
    _, ended, alone = played(StudyKind(1), 160)
    _, _, together = played(StudyKind(16), 160)
    assert ended == list(range(160))
    assert alone == pytest.approx(160, rel=0.05)
    assert together == pytest.approx(alone / 16, rel=0.15)


def test_plans_of_one_pass_end_together() -> None:
    _, ended, took = played(StudyKind(4, pack=4), 8)
    assert ended == list(range(8)) and took == pytest.approx(2, rel=0.2)


def test_a_frontier_has_the_volume_of_all_its_points() -> None:
    points = recorded_points()
    worst = reference_point(points)
    assert hypervolume(frontier_points(points), worst) == hypervolume(points, worst) > 0
    assert len(frontier_points(points)) < len(points)
