"""The pool: leases, deaths, errors, time limits."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_abliterate.cluster.connection import connect
from ray_abliterate.cluster.events import event_text
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.remote_errors import unwrap
from ray_abliterate.errors import ModelError, ScoreError, SearchError
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import ModelShape, Plan
from tests.support.stand_in_replicas import (
    SHAPE,
    CountingReplica,
    SharingReplica,
    StandInReplica,
    StoppableReplica,
    begin,
    pool_of,
)

pytestmark = pytest.mark.ray

PLAN = Plan.uniform(ModelShape(8, 32, ("attn",)), 3.0, "none")


def test_calls_are_spread_over_replicas_and_leave_them_free(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    ray.get([begin(pool, StandInReplica.sleep, 0.0) for _ in range(2)])
    started = time.monotonic()
    ray.get([begin(pool, StandInReplica.sleep, 0.5) for _ in range(4)])
    assert 0.9 < time.monotonic() - started < 1.8


def test_an_error_is_raised_as_itself_and_frees_the_replica(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1)
    for _ in range(3):
        with pytest.raises(ScoreError, match="the score is broken"):
            unwrap(begin(pool, StandInReplica.fail))
    assert unwrap(begin(pool, StandInReplica.echo, 1, 2)) == (1, 2)


def test_work_of_a_replica_that_dies_goes_to_another_at_once(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    (tmp_path / "die-once").touch()
    evaluation = unwrap(pool.actor.evaluate_trial.remote(PLAN, [None]))
    assert evaluation.scorecard["rate"].value == 1.0
    ray.get([begin(pool, StandInReplica.echo, i) for i in range(10)], timeout=30)


def test_thresholds_go_with_trials_only_and_grow(tmp_path: Path) -> None:
    pool, plan = pool_of(tmp_path, 1, kind=StoppableReplica), Plan.uniform(SHAPE, 3.0, "none")
    unwrap(pool.actor.evaluate_trial.remote(plan, [None]))
    ray.get(pool.actor.add_threshold.remote((0.0, 0.0)))
    unwrap(pool.actor.evaluate_trial.remote(plan, [None]))
    ray.get(pool.actor.begin_round.remote(1, ThresholdSet(((1.0, 2.0),))))
    ray.get(pool.actor.add_threshold.remote((2.0, 1.0)))
    unwrap(pool.actor.evaluate_trial.remote(plan, [None]))
    lines = (tmp_path / "thresholds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [None, None, [[1.0, 2.0], [2.0, 1.0]]]
    assert unwrap(begin(pool, StandInReplica.echo, 1)) == (1,)


@pytest.mark.parametrize(("trials", "passes"), [(1, 1), (4, 1), (6, 2), (9, 3)])
def test_plans_that_wait_share_passes(tmp_path: Path, trials: int, passes: int) -> None:
    pool = pool_of(tmp_path, 1, seconds=0.2)
    ray.get(pool.actor.begin_round.remote(trials, None))
    plans = [
        Plan.uniform(ModelShape(8, 32, ("attn",)), 3.0, "none", 0.1 * i) for i in range(trials)
    ]
    found = [
        unwrap(r) for r in [pool.actor.evaluate_trial.remote(plan, [None], 4) for plan in plans]
    ]
    kl = [evaluation.scorecard["kl"].value for evaluation in found]
    assert kl == [plan.profiles[0][1].peak for plan in plans]
    assert (tmp_path / "passes").read_text().count("pass") == passes


def test_a_plan_that_fails_in_a_shared_pass_fails_alone(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1, seconds=0.2)
    ray.get(pool.actor.begin_round.remote(3, None))
    (tmp_path / "nan-once").touch()
    rates, errors = [], []
    for call in [pool.actor.evaluate_trial.remote(PLAN, [None], 4) for _ in range(3)]:
        try:
            rates.append(unwrap(call).scorecard["rate"].value)
        except ScoreError as error:
            errors.append(str(error))
    assert rates == [1.0, 1.0]
    assert len(errors) == 1
    assert "not a finite number" in errors[0]


def test_a_shared_pass_that_loses_its_replica_is_done_by_another(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2, seconds=0.2)
    ray.get(pool.actor.begin_round.remote(4, None))
    (tmp_path / "die-once").touch()
    calls = [pool.actor.evaluate_trial.remote(PLAN, [None], 4) for _ in range(4)]
    assert [unwrap(call).scorecard["rate"].value for call in calls] == [1.0] * 4


def test_a_call_that_kills_two_replicas_fails_and_both_come_back(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    with pytest.raises(SearchError, match="two replicas died"):
        unwrap(begin(pool, StandInReplica.die))
    started = time.monotonic()
    ray.get([begin(pool, StandInReplica.sleep, 1.0) for _ in range(2)], timeout=60)
    assert time.monotonic() - started < 50


def test_a_replica_that_hangs_is_restarted(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1, seconds=60.0, timeout=0.5)
    with pytest.raises(SearchError, match=r"trial_timeout_seconds = 0\.5"):
        unwrap(pool.actor.evaluate_trial.remote(PLAN, [None]))
    assert unwrap(begin(pool, StandInReplica.echo, "back")) == ("back",)


def test_replicas_of_a_node_share_one_copy_that_outlives_its_maker(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 3, kind=SharingReplica)
    calls = [begin(pool, SharingReplica.share, "layer 0") for _ in range(30)]
    found = [unwrap(call) for call in calls]
    [value] = {value for _, _, value, _ in found}
    assert len({pid for _, pid, _, _ in found}) == 3
    assert not any(writeable for *_, writeable in found)
    [maker] = {pid for index, pid, _, _ in found if index + 1 == value}
    os.kill(maker, signal.SIGKILL)
    pids: set[int] = set()
    deadline = time.monotonic() + 30
    while len(pids) < 3 and time.monotonic() < deadline:
        again = [begin(pool, SharingReplica.share, "layer 0") for _ in range(6)]
        answers = [unwrap(call) for call in again]
        assert {answer[2] for answer in answers} == {value}
        pids |= {pid for _, pid, _, _ in answers}
    assert len(pids) == 3 and maker not in pids


def test_results_by_reference_are_not_read_by_the_pool_and_outlive_their_replica(
    tmp_path: Path,
) -> None:
    pool = pool_of(tmp_path, 2)
    found = dict(pool.map_by_reference(StandInReplica.echo, [(i, "x" * 200_000) for i in range(6)]))
    assert sorted(found) == list(range(6))
    with pytest.raises(SearchError, match="two replicas died"):
        pool.call(StandInReplica.die)
    assert [pool.store.fetch(found[i])[0] for i in range(6)] == list(range(6))


def test_what_happens_to_replicas_is_reported(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    pool = pool_of(tmp_path, 2, events=events)
    (tmp_path / "die-once").touch()
    unwrap(pool.actor.evaluate_trial.remote(PLAN, [None]))
    deadline = time.monotonic() + 30
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    kinds = [event["event"] for event in events]
    assert kinds == ["replica-lost", "call-moved", "replica-back"]
    assert "replica" in event_text(events[0]) and "is back after" in event_text(events[2])


def test_a_model_that_cannot_be_loaded_is_one_clear_error(recipe: Recipe, tmp_path: Path) -> None:
    connect(dashboard=False)
    with (
        pytest.raises(ModelError, match=r"no config\.json"),
        ReplicaPool.start(recipe, str(tmp_path), {}),
    ):
        pass


def test_a_stream_continues_on_another_replica_but_not_forever(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2, kind=CountingReplica)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number, item in pool.streams(
        CountingReplica.count, 2, lambda n: (len(seen[n]), 6, 3 if n else 99)
    ):
        seen[number].append(item)
    assert seen == {0: list(range(6)), 1: list(range(6))}  # the second's dies before item 3
    with pytest.raises(SearchError, match="its process died, twice over the same piece"):
        list(pool.streams(CountingReplica.count, 1, lambda n: (0, 6, 0)))
