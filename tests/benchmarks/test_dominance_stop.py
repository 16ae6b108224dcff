"""The benchmark that replays a recorded study: what it reads, and that its figures are its own."""

import json
from pathlib import Path

import pytest

from benchmarks.dominance_stop import RecordedTrial, read_study, recorded_trial, replay
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def recorded(number: int, kl: float, decided: tuple[int | None, ...]) -> RecordedTrial:
    hits = sum(at is not None for at in decided)
    return RecordedTrial(number, kl, hits, 1.0, (10,) * len(decided), decided)


def test_a_replay_counts_what_is_not_generated() -> None:
    study = [
        recorded(0, 0.5, (4, None)),  # ten steps, the frontier
        recorded(1, 0.9, (2, 8)),  # beaten at the first hit: two steps of eight
        recorded(2, 0.1, (3, 3)),  # the frontier
        recorded(3, 0.6, (1, 2)),  # beaten at the first hit: one step of two
        recorded(4, 0.9, (None, None)),  # the best rate of all
        recorded(5, 1.0, (None, None)),  # beaten before it answers
    ]
    figures = replay(study, slots=1, batch=2)
    assert figures["same_frontier"] and figures["frontier"] == [4, 0, 2]
    assert figures["stopped"] == 3 and figures["stopped_before_the_first_token"] == 1
    assert figures["share_of_steps_saved"] == pytest.approx(17 / 43, abs=1e-3)
    alone = replay(study, slots=6, batch=2)
    assert alone["stopped"] == 0 and alone["same_frontier"]


def test_hits_without_recorded_answers_come_evenly(tmp_path: Path) -> None:
    detail = {"hits": 3, "total": 5, "empty": 1, "degenerate": 0}
    scores = (
        Score("rate", 0.6, 0.0, 1.0, detail=detail),
        Score("kl", 0.25, 0.0, 1.0, unit="nats per token"),
    )
    trial = Trial(7, Plan.nothing(), Scorecard(scores), 2.0)
    assert recorded_trial(trial, None).decided == (50, 100, None, None, None)
    (tmp_path / "trials.jsonl").write_text(trial.to_json() + "\n")
    assert read_study(tmp_path / "trials.jsonl") == [recorded_trial(trial, None)]


def test_the_figures_are_those_of_the_study_beside_them() -> None:
    figures = json.loads((RESULTS / "dominance.json").read_text())["figures"]
    study = read_study(RESULTS / "dominance_study.jsonl")
    assert replay(study, figures["slots"], figures["batch"]) == figures
    assert figures["same_frontier"]
