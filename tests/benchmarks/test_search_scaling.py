"""The scaling benchmark's own parts: the surrogate, the virtual clock, its arithmetic."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.harness.recorded_study import SPACE, Surrogate, recorded
from benchmarks.search_scaling.__main__ import doublings
from benchmarks.search_scaling.budget_efficiency import AHEAD, Way, best, play, reference, volume
from benchmarks.search_scaling.throughput import Tally, per_trial, share_of_ideal

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate(recorded())


def test_the_recorded_plans_are_those_of_the_recorded_answers() -> None:
    def scores(file: str) -> list[tuple[int, int, float]]:
        rows = map(json.loads, (RESULTS / file).read_text().splitlines())
        return [(row["number"], row["hits"], row["kl"]) for row in rows]

    assert scores("demo_plans.jsonl") == scores("dominance_study.jsonl")


def test_the_surrogate_gives_recorded_trials_their_scores(surrogate: Surrogate) -> None:
    for point in recorded():
        found = surrogate.point(point.plan.to_params())
        assert found.hits == point.hits
        assert found.kl == pytest.approx(point.kl, rel=1e-3)


def test_the_surrogate_is_finite_and_the_same_in_every_run(surrogate: Surrogate) -> None:
    again = Surrogate(recorded())
    for params in SPACE.seeds(15.0):
        found = surrogate.point(params)
        assert found == again.point(params)
        assert 0 <= found.hits <= found.total and math.isfinite(found.kl) and found.kl > 0


def test_the_surrogate_predicts_a_trial_better_than_the_mean_does(surrogate: Surrogate) -> None:
    assert max(surrogate.left_out_errors.values()) < 0.7


def played(way: Way, trials: int) -> tuple[list[int], list[int], float]:
    """Most plans in flight before each ask, plans in the order of their ends, and the time."""
    live: list[int] = []
    ended: list[int] = []
    number = iter(range(trials))

    def ask() -> int:
        asked = next(number)
        live.append(asked - len(ended))
        return asked

    return live, ended, play(ask, ended.append, trials, way, seed=0)


@pytest.mark.parametrize("way", [Way(1), Way(4), Way(16), Way(16, pack=4), Way(64)])
def test_every_plan_ends_once_and_no_more_fly_than_may(way: Way) -> None:
    live, ended, _ = played(way, 50)
    assert sorted(ended) == list(range(50))
    assert max(live) < way.concurrency + AHEAD


def test_one_replica_takes_plans_in_turn_and_sixteen_take_a_sixteenth_of_the_time() -> None:
    _, ended, alone = played(Way(1), 160)
    _, _, together = played(Way(16), 160)
    assert ended == list(range(160))
    assert alone == pytest.approx(160, rel=0.05)
    assert together == pytest.approx(alone / 16, rel=0.15)


def test_plans_of_one_pass_end_together() -> None:
    _, ended, took = played(Way(4, pack=4), 8)
    assert ended == list(range(8)) and took == pytest.approx(2, rel=0.2)


def test_a_frontier_has_the_volume_of_all_its_points() -> None:
    points = recorded()
    worst = reference(points)
    assert volume(best(points), worst) == volume(points, worst) > 0
    assert len(best(points)) < len(points)


def test_the_most_gpus_are_measured_even_if_no_power_of_two() -> None:
    assert doublings(1) == [1]
    assert doublings(16) == [1, 2, 4, 8, 16]
    assert doublings(12) == [1, 2, 4, 8, 12]


def trials_of(*begun: float) -> list[dict[str, float]]:
    """Trials of two seconds, by when they began."""
    return [{"began": 10.0 + at, "ended": 12.0 + at} for at in begun]


def test_ideal_is_every_gpu_busy_from_when_most_are_to_the_last_end() -> None:
    found = share_of_ideal(trials_of(0, 0, 3, 3), gpus=2, seconds=2.0)
    assert found["seconds"] == 5.0 and found["efficiency"] == pytest.approx(0.8)
    assert found["ideal_per_hour"] == 3600 and found["trials_per_hour"] == 2880


def test_a_trial_process_that_comes_late_counts_from_then_on_for_all() -> None:
    """The first has two trials behind it, and is in the middle of its third."""
    found = share_of_ideal(trials_of(0, 2, 4, 5, 6, 7), gpus=2, seconds=2.0)
    assert found["seconds"] == 4.0 and found["efficiency"] == pytest.approx(3.5 / 4)


def test_processor_time_is_counted_between_two_moments() -> None:
    first = Tally(0.0, Counter(driver=3.0), ())
    last = Tally(9.0, Counter(driver=4.0, pool=0.5), ())
    assert per_trial(first, last, 10) == {"driver": 0.1, "pool": 0.05}
