"""The recorded study as a function: its data, and how well it predicts."""

import json
import math

import pytest

from benchmarks.harness.record import RESULTS
from benchmarks.harness.recorded_study import SPACE, Surrogate, recorded_points


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate(recorded_points())


def test_the_recorded_plans_are_those_of_the_recorded_answers() -> None:
    def scores(file: str) -> list[tuple[int, int, float]]:
        rows = map(json.loads, (RESULTS / file).read_text().splitlines())
        return [(row["number"], row["hits"], row["kl"]) for row in rows]

    assert scores("demo_plans.jsonl") == scores("dominance_study.jsonl")


def test_the_surrogate_gives_recorded_trials_their_scores(surrogate: Surrogate) -> None:
    for point in recorded_points():
        predicted = surrogate.point(point.plan.to_params())
        assert predicted.hits == point.hits
        assert predicted.kl == pytest.approx(point.kl, rel=1e-3)


def test_the_surrogate_is_finite_and_the_same_in_every_run(surrogate: Surrogate) -> None:
    again = Surrogate(recorded_points())
    for params in SPACE.initial_points(15.0):
        predicted = surrogate.point(params)
        assert predicted == again.point(params)
        assert (
            0 <= predicted.hits <= predicted.total
            and math.isfinite(predicted.kl)
            and predicted.kl > 0
        )


def test_the_surrogate_predicts_a_trial_better_than_the_mean_does(surrogate: Surrogate) -> None:
    assert max(surrogate.left_out_errors.values()) < 0.7
