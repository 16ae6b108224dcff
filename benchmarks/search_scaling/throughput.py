"""Trials per hour by the number of GPUs, on simulated nodes; part of `scaling`.

The real search: Tune, the sampler, the journal, the replica pool. Nodes are simulated
(`ray.cluster_utils.Cluster`) and their GPUs are logical; in place of a replica stands one that
holds its GPU for a fixed time per trial. All processes share one machine's cores, so this is what
the head of a cluster has to do, with the workers' processes on top.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.search_overhead import GOALS, settings, space

GPUS_PER_NODE = 4
HEAD_CPUS = 2


class TimedReplica:
    """Stands where a replica stands, and takes a fixed time."""

    def __init__(self, place: Any, seconds: float) -> None:
        self._seconds = seconds

    def call(self, method: str, *args: Any) -> Any:
        """A scorecard out of thin air, different for each plan, that says when it was made."""
        from ray_abliterate.replica.messages import Evaluation
        from ray_abliterate.search.score import Score, Scorecard

        if method == "describe":
            return "a replica that only waits"
        began = time.time()
        time.sleep(self._seconds)
        x = args[0].profiles[0][1].peak / 2
        detail = {"began": began, "ended": time.time()}
        scores = (Score("rate", x, x, x, detail=detail), Score("kl", 1 - x, 1 - x, 1 - x))
        return Evaluation(Scorecard(scores), self._seconds)


@dataclass(frozen=True)
class Tally:
    """What the search's processes had used at some moment."""

    at: float
    cpu: Counter[str]
    """CPU seconds by kind of process."""
    trial_bytes: tuple[int, ...]
    """Memory that each trial's process shares with no other."""

    @classmethod
    def now(cls) -> "Tally":
        """As of now."""
        cpu: Counter[str] = Counter({"driver": _cpu(psutil.Process())})
        own = []
        for process in psutil.Process().children(recursive=True):
            try:
                kind = _kind(process)
                if kind:
                    cpu[kind] += _cpu(process)
                if kind == "trial processes":
                    own.append(process.memory_full_info().uss)
            except psutil.Error:  # it has just ended
                continue
        return cls(time.time(), cpu, tuple(own))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


KINDS = (
    ("PlanTrial", "trial processes"),
    ("replica-pool", "pool"),
    ("PoolActor", "pool"),
    ("TimedReplica", "replicas"),
    ("gcs_server", "control store"),
    ("raylet", "raylets"),
    ("DashboardAgent", "nodes' agents"),
    ("RuntimeEnvAgent", "nodes' agents"),
)
"""What a command line holds, and what that process is; others are not counted."""


def _kind(process: psutil.Process) -> str:
    title = " ".join(process.cmdline()[:1])
    return next((kind for part, kind in KINDS if part in title), "")


def figures(
    gpus: Sequence[int], seconds: float, rounds: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The figures of each number of GPUs."""
    rows = []
    for count in gpus:
        with cluster(count):
            rows.append(measure(count, seconds, rounds * count))
        report(f"{count} GPUs: {rows[-1]}")
    return rows


@contextmanager
def cluster(gpus: int) -> Iterator[None]:
    """Simulated nodes with so many logical GPUs; Ray's files lie apart from other Rays' files."""
    with tempfile.TemporaryDirectory(prefix="ra") as scratch:
        os.environ["RAY_TMPDIR"] = scratch
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": HEAD_CPUS, "num_gpus": 0, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for first in range(0, gpus, GPUS_PER_NODE):
                here = min(GPUS_PER_NODE, gpus - first)
                made.add_node(num_cpus=GPUS_PER_NODE, num_gpus=here)
            path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
            ray.init(
                address=made.address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
            yield
        finally:
            ray.shutdown()
            made.shutdown()


def measure(gpus: int, seconds: float, trials: int) -> dict[str, Any]:
    """One search over the cluster at hand."""
    import ray

    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import Hosting
    from ray_abliterate.cluster.tune_search import Search
    from ray_abliterate.recipe import ModelSettings

    model = ModelSettings(name="timed", gpus_per_replica=1, threads_per_replica=1)
    details: list[dict[str, float]] = []
    tallies: list[Tally] = []
    first = min(gpus, trials - 1)
    span = (first, max(trials - gpus, first + 1))
    """Trials that ended when CPU is counted: all slots are at work, none has ended."""

    def ended(trial: Any, answers: Any) -> None:
        assert trial.scorecard is not None, trial.error
        details.append(trial.scorecard["rate"].detail)
        if len(details) in span:
            tallies.append(Tally.now())

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ReplicaPool.of(Hosting(TimedReplica, (seconds,), model)) as pool:
            assert pool.layout.replicas == gpus
            while pool.replicas < gpus:
                time.sleep(0.05)
            stored = stored_bytes()
            search = Search(folder / "study.journal", space(), settings(trials), GOALS)
            search.run(pool, ray.put(None), (), ended, folder / "tune")
            stored = stored_bytes() - stored
        journal_bytes = (folder / "study.journal").stat().st_size
    return {
        "gpus": gpus,
        "trial_seconds": seconds,
        **share_of_ideal(details, gpus, seconds),
        "cpu_seconds_per_trial": per_trial(*tallies, span[1] - span[0]),
        "trial_process_mb": round(median(tallies[0].trial_bytes) / 1e6) if tallies else None,
        "object_store_bytes_per_trial": round(stored / trials),
        "journal_bytes_per_trial": round(journal_bytes / trials),
    }


def share_of_ideal(
    details: Sequence[dict[str, float]], gpus: int, seconds: float
) -> dict[str, float]:
    """Trials per hour from when most trials are in flight to the last one's end, and what share of
    the ideal.

    Ideal is that every GPU evaluates all the time. Start-up, while trial processes are still
    coming up, is left out: a trial counts by the part of it that lies in this time. The end is not,
    when some GPUs have nothing left to do.
    """
    start, end = when_most_are_in_flight(details), max(d["ended"] for d in details)
    trials = sum(
        max(d["ended"] - max(d["began"], start), 0) / (d["ended"] - d["began"]) for d in details
    )
    return {
        "trials": len(details),
        "seconds": round(end - start, 2),
        "trials_per_hour": round(3600 * trials / (end - start), 1),
        "ideal_per_hour": round(3600 * gpus / seconds, 1),
        "efficiency": round(trials * seconds / (gpus * (end - start)), 4),
    }


def when_most_are_in_flight(details: Sequence[dict[str, float]]) -> float:
    """The first moment at which as many trials are evaluated as ever."""
    moments = sorted([(d["began"], 1) for d in details] + [(d["ended"], -1) for d in details])
    running, most, found = 0, 0, 0.0
    for at, change in moments:
        running += change
        if running > most:
            most, found = running, at
    return found


def per_trial(first: Tally, last: Tally, trials: int) -> dict[str, float]:
    """CPU seconds per trial of each kind of process, start-up left out."""
    return {
        kind: round((last.cpu[kind] - first.cpu[kind]) / trials, 4) for kind in sorted(last.cpu)
    }


def stored_bytes() -> int:
    """Bytes of all objects that were ever put into the object stores of the cluster."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(None)
    return int(get_memory_info_reply(state).store_stats.cumulative_created_bytes)
