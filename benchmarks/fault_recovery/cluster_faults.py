"""Faults of replicas, trials and nodes, on the cluster that this process is connected to.

Each scenario is a function of an empty folder and that cluster; its docstring says what is done.
"""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

from benchmarks.fault_recovery.faulty_search import FaultySearch
from benchmarks.fault_recovery.outcome import Outcome, check


def replica_killed(folder: Path, cluster: Any) -> Outcome:
    """Kill the process of a replica that evaluates, as the kernel does when memory runs out."""
    search = FaultySearch(folder)
    return search.run(lambda search: os.kill(search.evaluations()[-1]["pid"], signal.SIGKILL))


def trial_process_killed(folder: Path, cluster: Any) -> Outcome:
    """Kill the process of a trial slot."""
    return FaultySearch(folder).run(lambda search: _child("PlanTrial").kill())


def pool_killed(folder: Path, cluster: Any) -> Outcome:
    """Kill the process of the pool; its replicas end with it."""
    return FaultySearch(folder).run(lambda search: _child("PoolActor").kill())


def _child(title: str) -> Any:
    """Return the first process below this one whose command line begins with so titled an actor."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return next(child for child in children if title in " ".join(child.cmdline()[:1]))


def replica_hangs(folder: Path, cluster: Any) -> Outcome:
    """Let a replica answer no more; `search.trial_timeout_seconds` is 2."""
    return FaultySearch(folder, timeout=2.0).run(lambda search: (folder / "hang").touch())


def no_memory_in_a_replica(folder: Path, cluster: Any) -> Outcome:
    """Give an evaluation no memory, though batches were halved."""
    return FaultySearch(folder).run(lambda search: (folder / "no-memory").touch())


def no_memory_on_a_device(folder: Path, cluster: Any) -> Outcome:
    """Ask a GPU for more memory than it has, in an evaluation."""
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        search = FaultySearch(folder, replicas=2, gpus_per_replica=0.5)
        return search.run(lambda search: (folder / "no-device-memory").touch())
    finally:
        cluster.remove_node(node)


def node_out_of_memory(folder: Path, cluster: Any) -> Outcome:
    """Take more memory in a replica than its node has to give, so that Ray kills it."""
    import psutil

    from benchmarks.harness.stand_ins import EXCESSIVE_BYTES

    memory = psutil.virtual_memory()
    most = (memory.total - memory.available + 0.6 * EXCESSIVE_BYTES) / memory.total
    monitor = {"RAY_memory_usage_threshold": f"{most:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    node = cluster.add_node(num_cpus=1, num_gpus=1, env_vars=monitor)
    try:
        search = FaultySearch(folder, replicas=1, gpus_per_replica=1)
        return search.run(lambda search: (folder / "excessive-memory").touch(), replicas=1)
    finally:
        cluster.remove_node(node)


def node_removed(folder: Path, cluster: Any) -> Outcome:
    """Remove a node at once, with its replica, and add another."""
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    try:

        def replace_one(search: FaultySearch) -> None:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))

        search = FaultySearch(folder, trials=30, replicas=None, gpus_per_replica=1)
        outcome = search.run(replace_one)
        used = {entry["node"] for entry in search.evaluations()}
        check(len(used) == 3, f"{len(used)} nodes were used, not 3")
        return outcome
    finally:
        for node in nodes:
            cluster.remove_node(node)


def node_joined(folder: Path, cluster: Any) -> Outcome:
    """Add a node (no fault): the search makes room for one trial more at a time."""
    from ray_abliterate.cluster import tune_search

    nodes = [cluster.add_node(num_cpus=1, num_gpus=1)]
    before, tune_search.GROWTH_SECONDS = tune_search.GROWTH_SECONDS, 1.0
    try:
        search = FaultySearch(folder, trials=40, seconds=0.5, replicas=None, gpus_per_replica=1)
        join = lambda search: nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))  # noqa: E731
        outcome = search.run(join, replicas=1)
        began = sorted(entry["began"] for entry in search.evaluations())
        pairs = sum(b - a < 0.7 * search.seconds for a, b in itertools.pairwise(began))
        check(pairs >= 5, f"only {pairs} trials began while another one ran")
        return outcome
    finally:
        tune_search.GROWTH_SECONDS = before
        for node in nodes:
            cluster.remove_node(node)


def broken_node(folder: Path, cluster: Any) -> Outcome:
    """Start the search on two nodes, on one of which replicas can't be started."""
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    (folder / "broken" / nodes[0].node_id).mkdir(parents=True)
    try:
        search = FaultySearch(folder, replicas=None, gpus_per_replica=1)
        outcome = search.run(lambda search: None, replicas=1)
        check({e["node"] for e in search.evaluations()} == {nodes[1].node_id}, "wrong node")
        return outcome
    finally:
        for node in nodes:
            cluster.remove_node(node)


def object_store_full(folder: Path, cluster: Any) -> Outcome:
    """Store five times what a node's object store has room for; Ray spills to the disk."""
    from benchmarks.harness.stand_ins import FaultyReplica

    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
    try:

        def fill(search: FaultySearch) -> None:
            size = 10_000_000
            calls = [(value, size) for value in range(40)]
            arrays = list(search.pool.map_by_reference(FaultyReplica.make_array, calls))
            for value, reference in arrays:
                array = search.pool.store.fetch(reference)
                whole = bool((array == value).all()) and array.nbytes == size
                check(whole, f"array {value} is damaged")
                del array

        return FaultySearch(folder, replicas=1, gpus_per_replica=1).run(fill, replicas=1)
    finally:
        cluster.remove_node(node)
