"""The pool: leases, deaths, errors, time limits, layouts."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_abliterate.cluster.connection import connect
from ray_abliterate.cluster.events import describe
from ray_abliterate.cluster.placement import plan_layout
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.remote_errors import unwrap
from ray_abliterate.errors import ModelError, ScoreError, SearchError
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.search.dominance import Bar
from ray_abliterate.search.plan import ModelShape, Plan
from tests.cluster.hosts import SHAPE, CountingHost, SharingHost, StoppableHost, pool_of

PLAN = Plan.uniform(ModelShape(8, 32, ("attn",)), 3.0, "none")


def test_calls_are_spread_over_replicas_and_leave_them_free(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    ray.get([pool.actor.call.remote("sleep", [0.0]) for _ in range(2)])
    started = time.monotonic()
    ray.get([pool.actor.call.remote("sleep", [0.5]) for _ in range(4)])
    assert 0.9 < time.monotonic() - started < 1.8


def test_an_error_comes_back_as_itself_and_frees_the_replica(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1)
    for _ in range(3):
        with pytest.raises(ScoreError, match="the score is broken"):
            unwrap(pool.actor.call.remote("raise", []))
    assert unwrap(pool.actor.call.remote("echo", [1, 2])) == (1, 2)


def test_work_of_a_replica_that_dies_goes_to_another_at_once(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    (tmp_path / "die-once").touch()
    evaluation = unwrap(pool.actor.trial.remote(PLAN, [None]))
    assert evaluation.scorecard["rate"].value == 1.0
    ray.get([pool.actor.call.remote("echo", [i]) for i in range(10)], timeout=30)


def test_the_bar_goes_with_trials_alone_and_rises(tmp_path: Path) -> None:
    pool, plan = pool_of(tmp_path, 1, kind=StoppableHost), Plan.uniform(SHAPE, 3.0, "none")
    unwrap(pool.actor.trial.remote(plan, [None]))
    ray.get(pool.actor.raise_bar.remote((0.0, 0.0)))
    unwrap(pool.actor.trial.remote(plan, [None]))
    ray.get(pool.actor.expect.remote(1, Bar(((1.0, 2.0),))))
    ray.get(pool.actor.raise_bar.remote((2.0, 1.0)))
    unwrap(pool.actor.trial.remote(plan, [None]))
    bars = [json.loads(line) for line in (tmp_path / "bars.jsonl").read_text().splitlines()]
    assert bars == [None, None, [[1.0, 2.0], [2.0, 1.0]]]
    assert unwrap(pool.actor.call.remote("echo", [1])) == (1,)


@pytest.mark.parametrize(("trials", "passes"), [(1, 1), (4, 1), (6, 2), (9, 3)])
def test_plans_that_wait_share_passes(tmp_path: Path, trials: int, passes: int) -> None:
    pool = pool_of(tmp_path, 1, seconds=0.2)
    ray.get(pool.actor.expect.remote(trials, None))
    plans = [
        Plan.uniform(ModelShape(8, 32, ("attn",)), 3.0, "none", 0.1 * i) for i in range(trials)
    ]
    found = [unwrap(r) for r in [pool.actor.trial.remote(plan, [None], 4) for plan in plans]]
    kl = [evaluation.scorecard["kl"].value for evaluation in found]
    assert kl == [plan.profiles[0][1].peak for plan in plans]
    assert (tmp_path / "passes").read_text().count("pass") == passes


def test_a_plan_that_fails_in_a_shared_pass_fails_alone(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1, seconds=0.2)
    ray.get(pool.actor.expect.remote(3, None))
    (tmp_path / "nan-once").touch()
    rates, errors = [], []
    for call in [pool.actor.trial.remote(PLAN, [None], 4) for _ in range(3)]:
        try:
            rates.append(unwrap(call).scorecard["rate"].value)
        except ScoreError as error:
            errors.append(str(error))
    assert rates == [1.0, 1.0]
    assert len(errors) == 1
    assert "not a number" in errors[0]


def test_a_shared_pass_that_loses_its_replica_is_done_by_another(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2, seconds=0.2)
    ray.get(pool.actor.expect.remote(4, None))
    (tmp_path / "die-once").touch()
    calls = [pool.actor.trial.remote(PLAN, [None], 4) for _ in range(4)]
    assert [unwrap(call).scorecard["rate"].value for call in calls] == [1.0] * 4


def test_a_call_that_kills_two_replicas_fails_and_both_come_back(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    with pytest.raises(SearchError, match="two replicas died"):
        unwrap(pool.actor.call.remote("die", []))
    started = time.monotonic()
    ray.get([pool.actor.call.remote("sleep", [1.0]) for _ in range(2)], timeout=60)
    assert time.monotonic() - started < 50


def test_a_replica_that_hangs_is_started_anew(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1, seconds=60.0, timeout=0.5)
    with pytest.raises(SearchError, match=r"trial_timeout_seconds = 0\.5"):
        unwrap(pool.actor.trial.remote(PLAN, [None]))
    assert unwrap(pool.actor.call.remote("echo", ["back"])) == ("back",)


def test_replicas_of_a_node_share_one_copy_that_outlives_its_maker(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 3, kind=SharingHost)
    calls = [pool.actor.call.remote("share", ["layer 0"]) for _ in range(30)]
    found = [unwrap(call) for call in calls]
    [value] = {value for _, _, value, _ in found}
    assert len({pid for _, pid, _, _ in found}) == 3
    assert not any(writeable for *_, writeable in found)
    [maker] = {pid for index, pid, _, _ in found if index + 1 == value}
    os.kill(maker, signal.SIGKILL)
    pids: set[int] = set()
    deadline = time.monotonic() + 30
    while len(pids) < 3 and time.monotonic() < deadline:
        again = [pool.actor.call.remote("share", ["layer 0"]) for _ in range(6)]
        answers = [unwrap(call) for call in again]
        assert {answer[2] for answer in answers} == {value}
        pids |= {pid for _, pid, _, _ in answers}
    assert len(pids) == 3 and maker not in pids


def test_results_by_reference_are_not_read_by_the_pool_and_outlive_their_replica(
    tmp_path: Path,
) -> None:
    pool = pool_of(tmp_path, 2)
    found = dict(pool.map_by_reference("echo", [(i, "x" * 200_000) for i in range(6)]))
    assert sorted(found) == list(range(6))
    with pytest.raises(SearchError, match="two replicas died"):
        pool.call("die")
    assert [ray.get(found[i])[0] for i in range(6)] == list(range(6))


def test_what_happens_to_replicas_is_told(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    pool = pool_of(tmp_path, 2, events=events)
    (tmp_path / "die-once").touch()
    unwrap(pool.actor.trial.remote(PLAN, [None]))
    deadline = time.monotonic() + 30
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    kinds = [event["event"] for event in events]
    assert kinds == ["replica-lost", "call-moved", "replica-back"]
    assert "replica" in describe(events[0]) and "is back after" in describe(events[2])


def test_replicas_fit_the_gpus_there_are() -> None:
    def layout(gpus: float, **settings: object) -> tuple[int, float]:
        found = plan_layout(ModelSettings.model_validate({"name": "m", **settings}), 16, gpus)
        return found.replicas, found.gpus

    assert layout(0) == (1, 0)
    assert layout(2, gpus_per_replica=0.4) == (4, 0.4)
    assert layout(8) == (8, 1)
    assert layout(8, gpus_per_replica=2) == (4, 2)
    assert layout(1, gpus_per_replica=0.25) == (4, 0.25)
    assert layout(8, replicas=3) == (3, 1)
    assert layout(8, gpus_per_replica=0, replicas=2) == (2, 0)
    with pytest.raises(ModelError, match="there are 1 GPUs"):
        layout(1, gpus_per_replica=2)
    with pytest.raises(ModelError, match="4 fit"):
        layout(8, gpus_per_replica=2, replicas=5)


def test_cpu_threads_are_shared_out() -> None:
    settings = ModelSettings(name="m", replicas=3)
    assert plan_layout(settings, 7, 0).threads == 2
    assert plan_layout(ModelSettings(name="m", replicas=3), 2, 0).threads == 1


def test_a_model_that_cannot_be_loaded_is_one_clear_error(recipe: Recipe, tmp_path: Path) -> None:
    connect(dashboard=False)
    with (
        pytest.raises(ModelError, match=r"no config\.json"),
        ReplicaPool.start(recipe, str(tmp_path), {}),
    ):
        pass


def test_what_a_replica_yields_comes_on_from_another_but_not_without_end(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2, kind=CountingHost)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number, item in pool.streams("count", 2, lambda n: (len(seen[n]), 6, 3 if n else 99)):
        seen[number].append(item)
    assert seen == {0: list(range(6)), 1: list(range(6))}  # the second's dies before item 3
    with pytest.raises(SearchError, match="its process died, twice over the same piece"):
        list(pool.streams("count", 1, lambda n: (0, 6, 0)))
