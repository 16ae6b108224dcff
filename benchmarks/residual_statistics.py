"""Memory and time of statistics over residuals, by the number of prompts.

    python -m benchmarks.residual_statistics [--prompts 400 4000 40000]

Synthetic residuals, made shard by shard and forgotten; each statistic and number of prompts in a
process of its own, whose peak memory (resident set) is counted, less what it held before the first
shard. Times are of reducing, without making the residuals. "Residuals of one layer" is what methods
need that can't be streamed; it grows, by design one layer at a time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness.record import save

LAYERS, HIDDEN, ROWS = 4, 1024, 64
KINDS = ("sums", "variances", "covariance", "residuals")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[400, 4000, 40_000])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "PROMPTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    rows = []
    for kind in KINDS:
        for prompts in options.prompts:
            command = [
                sys.executable,
                "-m",
                "benchmarks.residual_statistics",
                "--one",
                kind,
                str(prompts),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"statistic": kind, "prompts": prompts, **json.loads(done.stdout)})
            print(rows[-1])
    figures = {"layers": LAYERS, "hidden": HIDDEN, "rows": ROWS, "measured": rows}
    print(save("statistics", figures))


def measure(kind: str, prompts: int) -> dict[str, float]:
    """Peak bytes and seconds of one statistic."""
    reduce_one, finish = reducer(kind)
    for batch in shards(2 * ROWS):  # libraries and buffers
        reduce_one(batch)
    reduce_one, finish = reducer(kind)
    before, seconds = peak(), 0.0
    for batch in shards(prompts):
        started = time.perf_counter()
        reduce_one(batch)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    finish()
    seconds += time.perf_counter() - started
    return {"added_bytes": peak() - before, "peak_bytes": peak(), "seconds": round(seconds, 3)}


def reducer(kind: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """What takes in a shard, and what gives the result."""
    from ray_abliterate.directions.residuals.moments import (
        Moments,
        PairedMoments,
        ResidualRows,
        moments_of,
        rows_of,
    )
    from ray_abliterate.directions.residuals.shard import sums_of

    total: list[Any] = []

    def add(part: Any) -> None:
        total[:] = [total[0] + part] if total else [part]

    if kind == "covariance":
        total.append(PairedMoments(Moments.nothing(HIDDEN)))
        return lambda batch: add(rows_of(batch, 0)), lambda: total[0].moments.covariance
    if kind == "residuals":
        total.append(ResidualRows(()))
        return lambda batch: add(rows_of(batch, 0)), lambda: total[0].values
    of = {"sums": sums_of, "variances": moments_of}[kind]
    return lambda batch: add(of(batch)), lambda: total[0]


def shards(prompts: int) -> Iterator[Any]:
    """Residuals of so many prompts: noise about a mean, the same for the same number of prompts."""
    import numpy

    from ray_abliterate.directions.residuals.shard import ResidualShard

    random = numpy.random.default_rng(0)
    mean = 10 * random.standard_normal((LAYERS, HIDDEN), numpy.float32)
    for first in range(0, prompts, ROWS):
        count = min(ROWS, prompts - first)
        values = random.standard_normal((count, LAYERS, HIDDEN), numpy.float32) + mean
        yield ResidualShard.of("synthetic", first, values).batch


def peak() -> int:
    """Most bytes that this process ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


if __name__ == "__main__":
    main()
