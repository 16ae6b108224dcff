"""Calls of replicas are checked by mypy: methods, arguments, results."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_abliterate.cluster.replica_call import ReplicaCall
from ray_abliterate.replica.messages import ReplicaApi

ROOT = Path(__file__).parents[2]

PROGRAM = """
from collections.abc import Iterator

from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.replica_call import ReplicaCall
from ray_abliterate.evaluation.streaming import ChunkResult
from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextRequest
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.replica.messages import Evaluation, ModelFacts, ReplicaApi, TrialSetup
from ray_abliterate.search.plan import Plan


def right(pool: ReplicaPool, plan: Plan, setup: TrialSetup, reading: ReadPlan) -> None:
    facts: ModelFacts = pool.facts
    tuning: Tuning = pool.call(ReplicaApi.tune, 2)
    tuning = pool.call(ReplicaApi.tune)
    shared: Reference[TrialSetup] = pool.put(setup)
    one: Evaluation = pool.call(ReplicaApi.evaluate, plan, shared.argument)
    one = pool.call(ReplicaApi.evaluate, plan, setup=shared.argument)
    several: Iterator[Evaluation] = pool.map(ReplicaApi.evaluate, [(plan, shared.argument)])

    def arguments(number: int) -> tuple[ReadPlan, int, None, ReadFiles | None, Plan, TrialSetup]:
        return reading, number, None, None, plan, shared.argument

    chunks: Iterator[tuple[int, ChunkResult]] = pool.streams(ReplicaApi.read, 3, arguments)
    call: ReplicaCall[ReadPlan] = ReplicaCall.of(ReplicaApi.plan_reading, TextRequest("t"), True)


def wrong(pool: ReplicaPool, plan: Plan, setup: TrialSetup) -> None:
    pool.call("tune", 2)  # wrong: a string
    pool.call(ReplicaApi.tune, "2")  # wrong: the type of an argument
    pool.call(ReplicaApi.tune, 2, 3)  # wrong: an argument too many
    pool.call(ReplicaApi.evaluate, plan)  # wrong: an argument is missing
    pool.call(ReplicaApi.evaluate, plan, pool.put(setup))  # wrong: a reference, no argument
    pool.call(ReplicaApi.evaluate, plan, pool.put(plan).argument)  # wrong: another value's
    text: str = pool.call(ReplicaApi.tune, 2)  # wrong: the result
    pool.call(ReplicaPool.put, plan)  # wrong: not a replica's method
    pool.call(ReplicaApi.measures, plan)  # wrong: no such method
    pool.map(ReplicaApi.evaluate, [(setup, plan)])  # wrong: the order of arguments
    pool.streams(ReplicaApi.evaluate, 1, lambda number: (plan, setup))  # wrong: no generator
    list(pool.map_by_reference(ReplicaApi.tune, [("2",)]))  # wrong: the type of an argument
    ReplicaCall.of(ReplicaApi.first_edited_block, plan)  # wrong: an argument is missing
    pool.facts.fingerprints  # wrong: no such fact
"""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> set[int]:
    """Numbers of the lines that mypy reports."""
    file = tmp_path_factory.mktemp("calls") / "calls.py"
    file.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(file)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert all(str(file) in line for line in lines), done.stdout
    return {int(line.removeprefix(str(file)).split(":")[1]) for line in lines}


def test_mypy_knows_the_results_of_calls_and_refuses_wrong_ones(reported: set[int]) -> None:
    lines = PROGRAM.splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "# wrong" in line}
    assert reported == wrong


def test_a_call_travels_as_a_name_and_arguments() -> None:
    call = ReplicaCall.of(ReplicaApi.tune, replicas=2)
    assert (call.method, call.args, call.options) == ("tune", (), {"replicas": 2})
