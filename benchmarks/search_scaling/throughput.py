"""Trials per hour by the number of GPUs, on simulated nodes.

    python -m benchmarks.search_scaling.throughput [--replicas 16] [--seconds 5] [--rounds 12]
        [--gpus 64]

The real search: Tune, the sampler, the journal, the replica pool. Nodes are simulated
(`ray.cluster_utils.Cluster`) and their GPUs are logical; in place of a replica stands one that
holds its GPU for a fixed time per trial. All processes share one machine's cores, so this is what
the head of a cluster has to do, with the workers' processes on top. The last line printed is the
share of the ideal throughput with the most GPUs.
"""

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.record import saved
from benchmarks.harness.simulated_cluster import simulated_cluster
from benchmarks.harness.tables import column_table

GPUS_PER_NODE = 4
HEAD_CPUS = 2


def main() -> None:
    """Measure every number of GPUs, print, save."""
    parser = CLAIM.parser(replicas=2, seconds=0.2, rounds=3)
    parser.add_argument("--replicas", type=int, default=16, help="most GPUs; doubled up to there")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of a trial")
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="*",
        help="measure these numbers only; saved figures of smaller ones stay",
    )
    parser.add_argument("--rounds", type=int, default=12, help="trials of each GPU")
    options = parser.parse_args()
    counts = options.gpus or doublings(options.replicas)
    rows = []
    for count in counts:
        with cluster(count):
            rows.append(measure(count, options.seconds, options.rounds * count))
        print(f"{count} GPUs: {rows[-1]}", file=sys.stderr, flush=True)
    smaller: list[dict[str, Any]] = []
    if options.gpus:
        smaller = [row for row in saved("scaling")["gpus"] if row["gpus"] < counts[0]]
    figures = {"seconds": options.seconds, "rounds": options.rounds, "gpus": [*smaller, *rows]}
    CLAIM.save(figures, options)
    print(f"efficiency at {rows[-1]['gpus']}: {100 * rows[-1]['efficiency']:.1f} %")


def doublings(most: int) -> list[int]:
    """Return 1, 2, 4, … and the most."""
    below = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*below, most]


@dataclass(frozen=True)
class CpuTally:
    """What the search's processes had used at some moment.

    Attributes:
        at: The moment.
        cpu: CPU seconds by kind of process.
        trial_bytes: Memory that each trial's process shares with no other.
    """

    at: float
    cpu: Mapping[str, float]
    trial_bytes: tuple[int, ...]

    @classmethod
    def now(cls) -> "CpuTally":
        """Return the tally of this moment."""
        cpu = defaultdict(float, driver=_cpu_seconds(psutil.Process()))
        trial_bytes = []
        for process in psutil.Process().children(recursive=True):
            try:
                kind = _kind(process)
                if kind:
                    cpu[kind] += _cpu_seconds(process)
                if kind == "trial processes":
                    trial_bytes.append(process.memory_full_info().uss)
            except psutil.Error:  # it has just ended
                continue
        return cls(time.time(), cpu, tuple(trial_bytes))


def _cpu_seconds(process: psutil.Process) -> float:
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
"""Part of a command line, and what that process is; others are not counted."""


def _kind(process: psutil.Process) -> str:
    title = " ".join(process.cmdline()[:1])
    return next((kind for part, kind in KINDS if part in title), "")


@contextmanager
def cluster(gpus: int) -> Iterator[None]:
    """Simulate nodes with so many logical GPUs; Ray's files lie apart from other Rays' files."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="ra") as scratch:
        os.environ["RAY_TMPDIR"] = scratch
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        environment = {"env_vars": {"PYTHONPATH": path}}
        with simulated_cluster(HEAD_CPUS, environment, num_gpus=0) as nodes:
            for first in range(0, gpus, GPUS_PER_NODE):
                nodes.add_node(num_cpus=GPUS_PER_NODE, num_gpus=min(GPUS_PER_NODE, gpus - first))
            yield


def measure(gpus: int, seconds: float, trials: int) -> dict[str, Any]:
    """Run one search over the cluster that this process is connected to; return its figures.

    Args:
        gpus: GPUs of the cluster, and replicas.
        seconds: Time of a trial.
        trials: Trials of the search.
    """
    from benchmarks.harness.default_search import GOALS, default_settings, default_space
    from benchmarks.harness.stand_ins import TimedReplica
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import ReplicaSpec
    from ray_abliterate.cluster.tune_search import TuneSearch
    from ray_abliterate.recipe import ModelSettings

    model = ModelSettings(name="timed", gpus_per_replica=1, threads_per_replica=1)
    details: list[dict[str, float]] = []
    tallies: list[CpuTally] = []
    first = min(gpus, trials - 1)
    # Trials that have ended when CPU is counted: all slots are at work, none has ended.
    counted_at = (first, max(trials - gpus, first + 1))

    def on_trial(trial: Any, answers: Any) -> None:
        assert trial.scorecard is not None, trial.error
        details.append(trial.scorecard["rate"].detail)
        if len(details) in counted_at:
            tallies.append(CpuTally.now())

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ReplicaPool.of(ReplicaSpec(TimedReplica, (seconds,), model)) as pool:
            assert pool.layout.replicas == gpus
            while pool.replicas < gpus:
                time.sleep(0.05)
            stored_before = stored_bytes()
            journal = folder / "study.journal"
            search = TuneSearch(journal, default_space(), default_settings(trials), GOALS)
            setup: Any = pool.put(None)  # stand-ins need none
            search.run(pool, setup, (), on_trial, folder / "tune")
            stored = stored_bytes() - stored_before
        journal_bytes = journal.stat().st_size
    first_tally, last_tally = tallies
    counted = counted_at[1] - counted_at[0]
    return {
        "gpus": gpus,
        "trial_seconds": seconds,
        **share_of_ideal(details, gpus, seconds),
        "cpu_seconds_per_trial": cpu_per_trial(first_tally, last_tally, counted),
        "trial_process_mb": round(median(first_tally.trial_bytes) / 1e6),
        "object_store_bytes_per_trial": round(stored / trials),
        "journal_bytes_per_trial": round(journal_bytes / trials),
    }


def share_of_ideal(
    details: Sequence[dict[str, float]], gpus: int, seconds: float
) -> dict[str, float]:
    """Return trials per hour from when most trials are in flight to the last one's end.

    Ideal is that every GPU evaluates all the time. Start-up, while trial processes are still
    coming up, is left out: a trial counts by the part of it that lies in this time. The end is not,
    when some GPUs have nothing left to do.

    Args:
        details: When each trial `began` and `ended`.
        gpus: GPUs that evaluate.
        seconds: Time of a trial.
    """
    start, end = most_in_flight_at(details), max(d["ended"] for d in details)
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


def most_in_flight_at(details: Sequence[dict[str, float]]) -> float:
    """Return the first moment at which as many trials are evaluated as ever."""
    moments = sorted([(d["began"], 1) for d in details] + [(d["ended"], -1) for d in details])
    running, most, first = 0, 0, 0.0
    for at, change in moments:
        running += change
        if running > most:
            most, first = running, at
    return first


def cpu_per_trial(first: CpuTally, last: CpuTally, trials: int) -> dict[str, float]:
    """Return the CPU seconds per trial of each kind of process, between two moments."""
    return {
        kind: round((seconds - first.cpu.get(kind, 0)) / trials, 4)
        for kind, seconds in sorted(last.cpu.items())
    }


def stored_bytes() -> int:
    """Return the bytes of all objects that were ever put into the cluster's object stores."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(None)
    return int(get_memory_info_reply(state).store_stats.cumulative_created_bytes)


def throughput_table(figures: Figures) -> list[str]:
    """Return trials per hour by the number of GPUs, and how many cores all processes keep busy."""

    def driver_ms(row: dict[str, Any]) -> float:
        return float(1000 * row["cpu_seconds_per_trial"]["driver"])

    def busy_cores(row: dict[str, Any]) -> float:
        return float(sum(row["cpu_seconds_per_trial"].values()) * row["trials_per_hour"] / 3600)

    columns = {
        "GPUs": lambda row: row["gpus"],
        "seconds a trial": lambda row: f"{row['trial_seconds']:g}",
        "trials an hour": lambda row: f"{row['trials_per_hour']:.0f}",
        "ideal": lambda row: f"{row['ideal_per_hour']:.0f}",
        "of ideal": lambda row: f"**{100 * row['efficiency']:.1f} %**",
        "cores that this takes": lambda row: f"{busy_cores(row):.2f}",
        "driver, CPU ms a trial": lambda row: (
            f"{1000 * row['cpu_seconds_per_trial']['driver']:.0f}"
        ),
        "object store, bytes a trial": lambda row: row["object_store_bytes_per_trial"],
    }
    return column_table(columns, figures["gpus"])


SERIAL_PROCESSES = ("driver", "pool", "control store")
"""Processes of which there is one, however many replicas there are."""
LEAST_EFFICIENCY = 0.5
"""A row below so much of the ideal is left out: something else than these processes held it up."""
LONG_SECONDS = 60
"""Time of a trial of a model that is worth a cluster."""


def limits_table(figures: Figures) -> list[str]:
    """Return at how many GPUs each process that there is only one of has its core full.

    The figures are those of the most GPUs whose trials went through nearly as they should.
    """
    most = [row for row in figures["gpus"] if row["efficiency"] > LEAST_EFFICIENCY][-1]
    short = figures["seconds"]
    costs = {name: most["cpu_seconds_per_trial"].get(name, 0) for name in SERIAL_PROCESSES}

    def gpus(cost: float, seconds: float) -> str:
        return f"{1 / cost:.0f} × {seconds:g} = {1 / cost * seconds:.0f}"

    columns = {
        "one process": lambda row: row[0],
        "CPU ms a trial": lambda row: f"{1000 * row[1]:.0f}",
        "trials a second at most": lambda row: f"1 / {row[1]:.3f} = {1 / row[1]:.0f}",
        f"GPUs with trials of {short:g} s": lambda row: gpus(row[1], short),
        f"GPUs with trials of {LONG_SECONDS} s": lambda row: gpus(row[1], LONG_SECONDS),
    }
    mb = most["trial_process_mb"]
    note = (
        f"A trial's process has {mb} MB of its own on the head: 64 take 64 × {mb} MB = "
        f"{64 * mb / 1000:.1f} GB, 256 take {256 * mb / 1000:.0f} GB. The journal grows by "
        f"{most['journal_bytes_per_trial']} bytes a trial."
    )
    rows = [(name, cost) for name, cost in costs.items() if cost]
    return [*column_table(columns, rows), "", note]


CLAIM = Claim(
    "search_scaling.throughput",
    "Trials per hour by the number of GPUs, on simulated nodes.",
    "scaling",
    {"throughput": throughput_table, "limits": limits_table},
)

if __name__ == "__main__":
    main()
