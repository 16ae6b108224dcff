"""What Tune, Ray and the sampler cost per trial: the real search over replicas that do nothing.

    python -m benchmarks.search_overhead [--trials 40] [--slots 2] [--seconds 0.0] [--rounds 3]

The overhead of a slot is the time in which its replica is not evaluating, per trial:
(wall x slots) / trials - seconds, from the first finished trial to the last. The baseline, in the
same run and interleaved, is a bare ask/tell loop over the same journal and sampler.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save
from ray_abliterate.cluster.replica_actor import Callee


class IdleHost(Callee):
    """Stands where a replica stands, and takes a fixed time."""

    def __init__(self, place: Any, seconds: float) -> None:
        self._seconds = seconds

    def call(self, method: str, *args: Any) -> Any:
        """A scorecard out of thin air, different for each plan."""
        if method == "describe":
            return "idle"
        from ray_abliterate.replica.messages import Evaluation
        from ray_abliterate.search.score import Score, Scorecard

        time.sleep(self._seconds)
        plan = args[0]
        x = plan.profiles[0][1].peak / 2
        scores = (Score("rate", x, x, x), Score("kl", 1 - x, 1 - x, 1 - x))
        return Evaluation(Scorecard(scores), self._seconds)


def search_seconds(trials: int, slots: int, seconds: float) -> list[float]:
    """Times at which the trials of one search ended."""
    import ray

    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import Hosting
    from ray_abliterate.cluster.tune_search import Search
    from ray_abliterate.recipe import ModelSettings

    own = ModelSettings(name="idle", replicas=slots, gpus_per_replica=0, threads_per_replica=1)
    hosting = Hosting(IdleHost, (seconds,), own)
    ended: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, ReplicaPool.of(hosting) as pool:
        while pool.replicas < slots:
            time.sleep(0.05)
        search = Search(Path(scratch) / "study.journal", space(), settings(trials), GOALS)
        on_trial = lambda trial, answers: ended.append(time.perf_counter())  # noqa: E731
        search.run(pool, ray.put(None), (), on_trial, Path(scratch) / "tune")
    return ended


def loop_seconds(trials: int) -> list[float]:
    """The same study without Tune and Ray, one trial at a time, objective left out."""
    from ray_abliterate.search import study as journal

    ended: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        storage = journal.open_storage(Path(scratch) / "study.journal")
        study = journal.open_study(storage, [goal for _, goal in GOALS])
        study.sampler = journal.sampler(settings(trials), 0)
        for _ in range(trials):
            asked = study.ask(journal.distributions(space()))
            x = asked.params["attn.peak"] / 2
            study.tell(asked, [x, 1 - x])
            ended.append(time.perf_counter())
    return ended


GOALS = [("rate", "minimize"), ("kl", "minimize")]


def space() -> Any:
    """The default space of a dense model with 32 layers."""
    from ray_abliterate.recipe import SpaceSettings
    from ray_abliterate.search.plan import ModelShape, Space

    return Space.of(ModelShape(32, 4096, ("attn", "mlp")), SpaceSettings(), "row")


def settings(trials: int) -> Any:
    """The default search."""
    from ray_abliterate.recipe import SearchSettings

    return SearchSettings(trials=trials)


def per_trial(ended: list[float]) -> float:
    """Seconds from one end to the next."""
    return (ended[-1] - ended[0]) / (len(ended) - 1)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from ray_abliterate.cluster.connection import connect

    connect(dashboard=False)
    through, bare = [], []
    for _ in range(options.rounds):
        ended = search_seconds(options.trials, options.slots, options.seconds)
        through.append(1000 * (per_trial(ended) * options.slots - options.seconds))
        bare.append(1000 * per_trial(loop_seconds(options.trials)))
    figures = {
        "trials": options.trials,
        "slots": options.slots,
        "objective_seconds": options.seconds,
        "overhead_ms_per_trial_slot": [round(x, 1) for x in through],
        "overhead_ms_median": round(statistics.median(through), 1),
        "bare_ask_tell_ms": [round(x, 1) for x in bare],
    }
    print(save("overhead", figures))
    print(f"bare ask/tell loop: {statistics.median(bare):.1f} ms per trial")
    print(f"overhead per trial slot: {statistics.median(through):.1f} ms")


if __name__ == "__main__":
    main()
