"""Memory and time of statistics over residuals, by the number of prompts.

    python -m benchmarks.residual_statistics [--prompts 400 4000 40000]

Synthetic residuals, made shard by shard and dropped; each statistic and number of prompts has a
process of its own, whose peak memory (resident set) is counted, less what it held before the first
shard. Times are of reducing, without making the residuals. "Residuals of one layer" is what methods
need that can't be streamed; it grows, by design one layer at a time.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.tables import cross_table
from benchmarks.harness.worker_process import call_in_new_process

LAYERS, HIDDEN, ROWS = 4, 1024, 64
STATISTICS = {
    "sums": "count and mean, all layers",
    "variances": "and variances, all layers",
    "covariance": "covariance, one layer",
    "residuals": "residuals themselves, one layer",
}


def main() -> None:
    """Measure every statistic at every size, print, save."""
    parser = CLAIM.parser(prompts=[128])
    parser.add_argument("--prompts", type=int, nargs="+", default=[400, 4000, 40_000])
    options = parser.parse_args()
    rows = []
    for statistic in STATISTICS:
        for prompts in options.prompts:
            measured = call_in_new_process(measure, statistic, prompts)
            rows.append({"statistic": statistic, "prompts": prompts, **measured})
            print(rows[-1])
    figures = {"layers": LAYERS, "hidden": HIDDEN, "rows": ROWS, "measured": rows}
    CLAIM.save(figures, options)


def measure(statistic: str, prompts: int) -> dict[str, float]:
    """Return peak bytes and seconds of one statistic."""
    reduce_one, finish = reducer(statistic)
    for batch in shards(2 * ROWS):  # loads libraries and allocates buffers
        reduce_one(batch)
    reduce_one, finish = reducer(statistic)
    before, seconds = peak_bytes(), 0.0
    for batch in shards(prompts):
        started = time.perf_counter()
        reduce_one(batch)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    finish()
    seconds += time.perf_counter() - started
    peak = peak_bytes()
    return {"added_bytes": peak - before, "peak_bytes": peak, "seconds": round(seconds, 3)}


def reducer(statistic: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """Return the function that takes in a shard, and the one that gives the result."""
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

    if statistic == "covariance":
        total.append(PairedMoments(Moments.empty(HIDDEN)))
        return lambda batch: add(rows_of(batch, 0)), lambda: total[0].moments.covariance
    if statistic == "residuals":
        total.append(ResidualRows(()))
        return lambda batch: add(rows_of(batch, 0)), lambda: total[0].values
    of_shard = {"sums": sums_of, "variances": moments_of}[statistic]
    return lambda batch: add(of_shard(batch)), lambda: total[0]


def shards(prompts: int) -> Iterator[Any]:
    """Yield residuals of so many prompts, noise about a mean; the same for the same number."""
    import numpy

    from ray_abliterate.directions.residuals.shard import ResidualShard

    random = numpy.random.default_rng(0)
    mean = 10 * random.standard_normal((LAYERS, HIDDEN), numpy.float32)
    for first in range(0, prompts, ROWS):
        count = min(ROWS, prompts - first)
        values = random.standard_normal((count, LAYERS, HIDDEN), numpy.float32) + mean
        yield ResidualShard.of("synthetic", first, values).batch


def statistics_table(figures: Figures) -> list[str]:
    """Return peak memory and time of each statistic, by the number of prompts."""
    rows = {(row["statistic"], row["prompts"]): row for row in figures["measured"]}
    sizes = sorted({prompts for _, prompts in rows})

    def cell(statistic: str, prompts: int) -> str:
        row = rows.get((statistic, prompts))
        return f"{row['added_bytes'] / 1e6:,.0f} MB, {row['seconds']:.2f} s" if row else "–"

    lines = {title: statistic for statistic, title in STATISTICS.items()}
    return cross_table("statistic", lines, {f"{size:,} prompts": size for size in sizes}, cell)


CLAIM = Claim(
    "residual_statistics",
    "Memory and time of statistics over residuals, by the number of prompts.",
    "statistics",
    {"statistics": statistics_table},
)

if __name__ == "__main__":
    main()
