"""The search: real Tune, real study, real pool; what is finished stays finished."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ray_abliterate.cluster.tune_search import TuneSearch
from ray_abliterate.errors import SearchError
from ray_abliterate.recipe import SearchSettings
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.frontier import SCORES, SECONDS, Frontier, Trial
from ray_abliterate.search.study import open_storage, open_study, optuna_distributions
from tests.support.stand_in_replicas import GOALS, SPACE, JitteryReplica, StoppableReplica, pool_of

pytestmark = pytest.mark.ray


def search(path: Path, trials: int, pool: Any, seeds: Any = (), **settings: object) -> list[Trial]:
    ended: list[Trial] = []
    chosen = SearchSettings.model_validate({"trials": trials, "startup_trials": 4, **settings})
    TuneSearch(path / "study.journal", SPACE, chosen, GOALS).run(  # type: ignore[arg-type]
        pool, pool.put(None), seeds, lambda trial, answers: ended.append(trial), path / "tune"
    )
    return ended


def study_in(path: Path) -> Any:
    return open_study(open_storage(path / "study.journal"), ["minimize", "minimize"])


def points(path: Path) -> list[tuple[tuple[str, Any], ...]]:
    return [tuple(sorted(t.params.items())) for t in study_in(path).get_trials()]


def test_a_study_ends_at_its_number_of_trials_and_resumes_without_repeating(
    tmp_path: Path,
) -> None:
    pool = pool_of(tmp_path, 2)
    seeds = SPACE.initial_points(5.0)
    first = search(tmp_path, 5, pool, seeds)
    assert len(first) == 5
    assert first[0].plan == SPACE.plan(seeds[0]) or first[1].plan == SPACE.plan(seeds[0])
    second = search(tmp_path, 9, pool, seeds)
    assert len(second) == 4
    assert search(tmp_path, 9, pool, seeds) == []
    found = points(tmp_path)
    assert len(found) == 9 == len(set(found))
    assert {t.state for t in study_in(tmp_path).get_trials()} == {TrialState.COMPLETE}
    opened = TuneSearch(tmp_path / "study.journal", SPACE, SearchSettings(trials=9), GOALS)  # type: ignore[arg-type]
    assert sorted(t.number for t in opened.finished) == list(range(9))
    assert {t.number: t for t in opened.finished} == {t.number: t for t in [*first, *second]}


def test_a_nan_score_fails_the_trial_with_its_reason_and_leaves_no_running_ghost(
    tmp_path: Path,
) -> None:
    (tmp_path / "nan-once").touch()
    ended = search(tmp_path, 4, pool_of(tmp_path, 1))
    failed = [trial for trial in ended if trial.error]
    assert len(ended) == 4 and len(failed) == 1
    assert "ScoreError" in (failed[0].error or "") and "nan" in (failed[0].error or "")
    states = [t.state for t in study_in(tmp_path).get_trials()]
    assert sorted(s.name for s in states) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]


def test_a_replica_killed_in_mid_trial_costs_no_trial(tmp_path: Path) -> None:
    (tmp_path / "die-once").touch()
    ended = search(tmp_path, 5, pool_of(tmp_path, 2))
    assert len(ended) == 5
    assert [trial.error for trial in ended] == [None] * 5


def test_as_many_plans_as_replicas_are_evaluated_at_once(tmp_path: Path) -> None:
    import time

    stamps: list[float] = []
    pool = pool_of(tmp_path, 3, seconds=1.0)
    chosen = SearchSettings(trials=12)
    TuneSearch(tmp_path / "study.journal", SPACE, chosen, GOALS).run(  # type: ignore[arg-type]
        pool, pool.put(None), (), lambda *_: stamps.append(time.monotonic()), tmp_path / "tune"
    )
    assert stamps[-1] - stamps[0] < 9 * 1.0 / 3 + 2.5  # one at a time would take 11 s


def test_trials_left_running_by_a_killed_driver_count_as_failed_and_are_made_up_for(
    tmp_path: Path,
) -> None:
    pool = pool_of(tmp_path, 1)
    search(tmp_path, 3, pool)
    study = study_in(tmp_path)
    for _ in range(2):
        study.ask(optuna_distributions(SPACE))
    search(tmp_path, 6, pool)
    states = [t.state for t in study_in(tmp_path).get_trials()]
    assert states.count(TrialState.RUNNING) == 0
    assert states.count(TrialState.FAIL) == 2
    assert states.count(TrialState.COMPLETE) == 6


def thresholds_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in (path / "thresholds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("slots", [1, 3])
def test_the_dominance_stop_changes_no_frontier_for_the_same_plans(
    tmp_path: Path, slots: int
) -> None:
    """All plans are start-up plans: the same by number, whatever came of those before."""
    found = {}
    for stop in (True, False):
        folder = tmp_path / str(stop)
        folder.mkdir()
        pool = pool_of(folder, slots, kind=StoppableReplica)
        found[stop] = search(folder, 30, pool, startup_trials=30, dominance_stop=stop)
    plans = {stop: {t.number: t.plan for t in ended} for stop, ended in found.items()}
    assert len(plans[True]) == 30 and plans[True] == plans[False]
    assert sum(trial.pruned for trial in found[True]) >= 3
    assert not any(trial.pruned for trial in found[False])
    assert thresholds_in(tmp_path / "False") == [None] * 30

    def points(stop: bool) -> list[tuple[int, Any]]:
        members = Frontier.of(found[stop]).members
        return [(member.number, member.scorecard) for member in members]

    assert points(True) == points(False)


def test_pruned_trials_count_and_stand_in_the_journal_as_what_they_are(tmp_path: Path) -> None:
    ended = search(tmp_path, 20, pool_of(tmp_path, 2, kind=StoppableReplica), startup_trials=20)
    opened = TuneSearch(tmp_path / "study.journal", SPACE, SearchSettings(trials=20), GOALS)  # type: ignore[arg-type]
    assert {t.number: t for t in opened.finished} == {t.number: t for t in ended}
    pruned = {trial.number: trial for trial in ended if trial.pruned}
    study = study_in(tmp_path)
    assert len(ended) == 20 and pruned
    assert {t.state for t in study.get_trials()} == {TrialState.COMPLETE}
    marked = {t.number for t in study.get_trials() if t.user_attrs.get("bounded")}
    assert marked == set(pruned)
    for number, trial in pruned.items():
        assert tuple(study.get_trials()[number].values) == trial.scorecard.losses  # type: ignore[union-attr]
    assert not set(pruned) & {trial.number for trial in study.best_trials}


def test_a_resumed_search_begins_with_the_thresholds_of_its_finished_trials(tmp_path: Path) -> None:
    first = search(tmp_path, 8, pool_of(tmp_path, 1, kind=StoppableReplica), startup_trials=12)
    (tmp_path / "thresholds.jsonl").unlink()
    search(tmp_path, 12, pool_of(tmp_path, 1, kind=StoppableReplica), startup_trials=12)
    expected = sorted(ThresholdSet.of(first).losses)
    assert len(expected) > 1
    assert sorted(tuple(losses) for losses in thresholds_in(tmp_path)[0]) == expected


def test_batches_give_the_same_study_whatever_the_timing(tmp_path: Path) -> None:
    found = []
    for attempt, replicas in enumerate((2, 3)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        pool = pool_of(folder, replicas, kind=JitteryReplica)
        search(folder, 8, pool, SPACE.initial_points(5.0), concurrency=4, batch_synchronous=True)
        trials = study_in(folder).get_trials()
        assert all(trial.state == TrialState.COMPLETE for trial in trials)
        found.append([(trial.number, trial.params, trial.values) for trial in trials])
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_a_trial_that_waited_for_its_batch_when_the_driver_died_is_finished(
    tmp_path: Path,
) -> None:
    search(tmp_path, 4, pool_of(tmp_path, 1))
    study = study_in(tmp_path)
    plan = study.get_trials()[-1]
    asked = study.ask(optuna_distributions(SPACE))
    for name in (SCORES, SECONDS):
        asked.set_user_attr(name, plan.user_attrs[name])
    opened = TuneSearch(tmp_path / "study.journal", SPACE, SearchSettings(trials=5), GOALS)  # type: ignore[arg-type]
    assert opened.interrupted == 0
    assert [trial.number for trial in opened.finished] == list(range(5))
    assert study_in(tmp_path).get_trials()[-1].values == plan.values


def test_a_torn_last_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1)
    search(tmp_path, 3, pool)
    file = tmp_path / "study.journal"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code": 4, "worker')
    assert len(search(tmp_path, 4, pool)) == 1
    assert file.read_bytes().startswith(whole)


def test_a_line_damaged_in_the_middle_of_the_journal_is_named_and_nothing_is_touched(
    tmp_path: Path,
) -> None:
    search(tmp_path, 2, pool_of(tmp_path, 1))
    file = tmp_path / "study.journal"
    lines = file.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"{torn\n", *lines[4:]])
    file.write_bytes(damaged)
    with pytest.raises(SearchError, match=f"line 4 of {len(lines)} is damaged"):
        TuneSearch(file, SPACE, SearchSettings(trials=3), GOALS)  # type: ignore[arg-type]
    assert file.read_bytes() == damaged
