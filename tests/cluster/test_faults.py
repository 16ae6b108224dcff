"""Faults, really done: no finished trial is lost, and the study ends at its number.

Each scenario raises if either does not hold; what is checked here is what it cost.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_recovery import cluster_faults, driver_faults
from benchmarks.fault_recovery.outcome import Outcome

Scenario = Callable[[Path, Any], Outcome]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
]  # beside the other tests, two starts of a run take minutes


@pytest.mark.parametrize(
    ("scenario", "again", "failed", "said"),
    [
        (cluster_faults.replica_killed, 1, 0, "was lost"),
        (cluster_faults.trial_process_killed, 1, 0, "process of a trial died"),
        (cluster_faults.pool_killed, 3, 0, ""),
        (cluster_faults.replica_hangs, 0, 1, "no answer within search.trial_timeout_seconds = 2"),
        (cluster_faults.no_memory_in_a_replica, 0, 1, ""),
        (cluster_faults.node_out_of_memory, 1, 0, "was lost"),
        pytest.param(cluster_faults.no_memory_on_a_device, 0, 1, "", marks=pytest.mark.gpu),
        (cluster_faults.node_removed, 1, 0, "joined"),
        (cluster_faults.node_joined, 0, 0, "joined"),
        (cluster_faults.broken_node, 0, 0, "CUDA driver initialization failed"),
        (cluster_faults.object_store_full, 0, 0, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_cluster_loses_no_finished_trial(
    scenario: Scenario, again: int, failed: int, said: str, tmp_path: Path, cluster: Any
) -> None:
    outcome = scenario(tmp_path, cluster)
    assert outcome.lost == 0
    assert outcome.finished_before >= 3
    assert outcome.again <= again
    assert outcome.failed == failed
    assert said in "\n".join(outcome.seen)


@pytest.mark.parametrize(
    "scenario",
    [  # killed and terminated drivers are in test_run.py, torn journals in test_search.py, damaged
        # shards in test_shards.py, and the lock that keeps a second driver out in test_rundir.py
        driver_faults.disk_full,
        driver_faults.clock_jumps,
    ],
    ids=lambda s: s.__name__,
)
def test_a_fault_of_the_driver_loses_no_finished_trial(scenario: Scenario, tmp_path: Path) -> None:
    if scenario is driver_faults.clock_jumps and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    outcome = scenario(tmp_path, None)
    assert outcome.lost == 0
    assert outcome.finished_before > 0
