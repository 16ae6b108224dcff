"""How reading a long text gets faster with more readers, and what a suite does.

    python -m benchmarks.evaluation_pool [--readers 1 2 4] [--seconds 0.5]

The real pool, the real cutting of a text and of a suite into pieces; in place of a model stands one
that takes a fixed time per chunk, so that the cores of this machine don't decide. Start-up is left
out: the pool is up when the clock starts.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.record import save
from ray_abliterate.cluster.replica_actor import Callee

CHUNKS = 64
"""Independent chunks of the text, and chunks of the suite."""


class TimedReader(Callee):
    """Takes a fixed time per chunk."""

    def __init__(self, place: Any, seconds: float) -> None:
        self._seconds = seconds

    def call(self, method: str, *args: Any) -> Any:
        """What a reader is asked for."""
        if method == "describe":
            return "a reader that only waits"
        if method == "route":
            return self._route(args[0])
        if method == "read":
            return self._read(args[1], args[2])
        time.sleep(self._seconds)
        return args[1].id

    def _route(self, reading: Any) -> Any:
        from ray_abliterate.evaluation.streaming.reader import ReadPlan

        stretch = None if reading.carry == "kv" else 4
        return ReadPlan(reading, "made up", CHUNKS * 100, CHUNKS, stretch, ())

    def _read(self, first: int, count: int | None) -> Iterator[Any]:
        from ray_abliterate.evaluation.streaming import ChunkResult

        for index in range(first, CHUNKS if count is None else first + count):
            time.sleep(self._seconds)
            yield ChunkResult(index, 100 * index, 100 * index + 100, 100, 1.0, 0.0, 1, 0)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=0.25, help="of a chunk")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ra")
    from ray_abliterate.cluster.connection import connect

    connect(dashboard=False)
    rows = [measured(count, options.seconds, options.repeats) for count in options.readers]
    print(save("evaluation_pool", {"seconds": options.seconds, "chunks": CHUNKS, "rows": rows}))
    for row in rows:
        print(row)


def measured(readers: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Seconds of a text read apart, of one read in order, and of a suite."""
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import Hosting
    from ray_abliterate.recipe import ModelSettings

    own = ModelSettings(name="timed", replicas=readers, threads_per_replica=1, gpus_per_replica=0)
    with ReplicaPool.of(Hosting(TimedReader, (seconds,), own)) as pool:
        while pool.replicas < readers:
            time.sleep(0.05)
        text_seconds(pool, "none")  # readers import what they need
        kinds = {"apart": "none", "in_order": "kv"}
        found = {
            name: median(text_seconds(pool, carry) for _ in range(repeats))
            for name, carry in kinds.items()
        }
        found["suite"] = median(suite_seconds(pool) for _ in range(repeats))
    return {"readers": readers, **{name: round(value, 3) for name, value in found.items()}}


def text_seconds(pool: Any, carry: str) -> float:
    """Of one text, read by two models: a base model and a trial."""
    from ray_abliterate.evaluation.streaming.reader import TextRequest
    from ray_abliterate.pipeline.progress import SilentProgress
    from ray_abliterate.pipeline.suite_runner import BASE_MODEL, Subject
    from ray_abliterate.pipeline.text_evaluation import read_text
    from ray_abliterate.search.plan import Plan

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("made up")
        subjects = (BASE_MODEL, Subject("trial-0", Plan.nothing()))
        reading, named = TextRequest(str(text), carry=carry), {"name": "timed", "weights": ""}
        to, started = Path(scratch) / "found", time.perf_counter()
        found = read_text(pool, reading, subjects, None, named, to, SilentProgress())
        took = time.perf_counter() - started
    assert [own.chunks for own in found.totals.values()] == [CHUNKS, CHUNKS]
    return took


def suite_seconds(pool: Any) -> float:
    """Of as many chunks of a suite."""
    from ray_abliterate.evaluation.suites.suite import Chunk
    from ray_abliterate.pipeline.suite_runner import AHEAD

    calls = ((None, Chunk("suite", str(i), "", ())) for i in range(CHUNKS))
    started = time.perf_counter()
    found = list(pool.map("measure", calls, AHEAD * pool.replicas))
    took = time.perf_counter() - started
    assert len(found) == CHUNKS
    return took


if __name__ == "__main__":
    main()
