"""What Tune, Ray and the sampler cost per trial: the real search over replicas that only wait.

    python -m benchmarks.search_overhead [--trials 40] [--slots 2] [--seconds 0.0] [--rounds 3]

The overhead of a slot is the time in which its replica is not evaluating, per trial:
(wall x slots) / trials - seconds, from the first finished trial to the last. The baseline, in the
same run and interleaved, is a bare ask/tell loop over the same journal and sampler.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table


def main() -> None:
    """Measure the overhead and the bare loop, print, save."""
    parser = CLAIM.parser(trials=6, rounds=1)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--slots", type=int, default=2, help="replicas, and trials in flight")
    parser.add_argument("--seconds", type=float, default=0.0, help="time of a trial")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from ray_abliterate.cluster.connection import connect

    connect(dashboard=False)
    overheads, bare = [], []
    for _ in range(options.rounds):
        ended = search(options.trials, options.slots, options.seconds)
        overheads.append(1000 * (seconds_per_trial(ended) * options.slots - options.seconds))
        bare.append(1000 * seconds_per_trial(ask_and_tell(options.trials)))
    figures = {
        "trials": options.trials,
        "slots": options.slots,
        "objective_seconds": options.seconds,
        "overhead_ms_per_trial_slot": [round(x, 1) for x in overheads],
        "overhead_ms_median": round(statistics.median(overheads), 1),
        "bare_ask_tell_ms": [round(x, 1) for x in bare],
    }
    CLAIM.save(figures, options)
    print(f"bare ask/tell loop: {statistics.median(bare):.1f} ms per trial")
    print(f"overhead per trial slot: {statistics.median(overheads):.1f} ms")


def search(trials: int, slots: int, seconds: float) -> list[float]:
    """Run one search and return the times at which its trials ended."""

    from benchmarks.harness.default_search import GOALS, default_settings, default_space
    from benchmarks.harness.stand_ins import TimedReplica
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import ReplicaSpec
    from ray_abliterate.cluster.tune_search import TuneSearch
    from ray_abliterate.recipe import ModelSettings

    model = ModelSettings(name="idle", replicas=slots, gpus_per_replica=0, threads_per_replica=1)
    ended: list[float] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        ReplicaPool.of(ReplicaSpec(TimedReplica, (seconds,), model)) as pool,
    ):
        while pool.replicas < slots:
            time.sleep(0.05)
        settings, journal = default_settings(trials), Path(scratch) / "study.journal"
        on_trial = lambda trial, answers: ended.append(time.perf_counter())  # noqa: E731
        search = TuneSearch(journal, default_space(), settings, GOALS)
        setup: Any = pool.put(None)  # stand-ins need none
        search.run(pool, setup, (), on_trial, Path(scratch) / "tune")
    return ended


def ask_and_tell(trials: int) -> list[float]:
    """Return when trials of the same study ended, one at a time, without Tune, Ray or objective."""
    from benchmarks.harness.default_search import GOALS, default_settings, default_space
    from ray_abliterate.search.study import (
        make_sampler,
        open_storage,
        open_study,
        optuna_distributions,
    )

    ended: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        storage = open_storage(Path(scratch) / "study.journal")
        study = open_study(storage, [goal for _, goal in GOALS])
        study.sampler = make_sampler(default_settings(trials), 0)
        for _ in range(trials):
            asked = study.ask(optuna_distributions(default_space()))
            x = asked.params["attn.peak"] / 2
            study.tell(asked, [x, 1 - x])
            ended.append(time.perf_counter())
    return ended


def seconds_per_trial(ended: list[float]) -> float:
    """Return the mean seconds from one end to the next."""
    return (ended[-1] - ended[0]) / (len(ended) - 1)


def overhead_table(figures: Figures) -> list[str]:
    """Return the overhead of Ray, Tune and the sampler, and the bare loop's time."""
    columns = {
        "overhead per trial and slot, ms": lambda row: row["overhead_ms_median"],
        "a bare ask/tell loop, ms": lambda row: statistics.median_high(row["bare_ask_tell_ms"]),
    }
    return column_table(columns, [figures])


CLAIM = Claim(
    "search_overhead",
    "What Tune, Ray and the sampler cost per trial: the real search over replicas that only wait.",
    "overhead",
    {"overhead": overhead_table},
)

if __name__ == "__main__":
    main()
