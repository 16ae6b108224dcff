"""How much faster a long text and a suite are read by more readers.

    python -m benchmarks.evaluation_pool [--readers 1 2 4] [--seconds 0.25] [--repeats 3]

The real pool, and the real division of a text and of a suite into pieces; in place of a model
stands one that takes a fixed time per chunk, so that the cores of this machine don't decide. The
clock starts when all readers are up.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table

CHUNKS = 64
"""Independent chunks of the text, and chunks of the suite."""


def main() -> None:
    """Measure every number of readers, print, save."""
    parser = CLAIM.parser(readers=[1, 2], seconds=0.01, repeats=1)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=0.25, help="time of a chunk")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ra")
    from ray_abliterate.cluster.connection import connect

    connect(dashboard=False)
    rows = [measure(count, options.seconds, options.repeats) for count in options.readers]
    CLAIM.save({"seconds": options.seconds, "chunks": CHUNKS, "rows": rows}, options)
    for row in rows:
        print(row)


def measure(readers: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Return seconds of a text read in independent chunks, of one read in order, and of a suite."""
    from benchmarks.harness.stand_ins import TimedReader
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.cluster.replica_actor import ReplicaSpec
    from ray_abliterate.recipe import ModelSettings

    model = ModelSettings(name="timed", replicas=readers, threads_per_replica=1, gpus_per_replica=0)
    with ReplicaPool.of(ReplicaSpec(TimedReader, (seconds, CHUNKS), model)) as pool:
        while pool.replicas < readers:
            time.sleep(0.05)
        text_seconds(pool, "none")  # readers import what they need
        carried = {"apart": "none", "in_order": "kv"}
        medians = {
            name: median(text_seconds(pool, carry) for _ in range(repeats))
            for name, carry in carried.items()
        }
        medians["suite"] = median(suite_seconds(pool) for _ in range(repeats))
    return {"readers": readers, **{name: round(value, 3) for name, value in medians.items()}}


def text_seconds(pool: Any, carry: str) -> float:
    """Return the seconds of one text, read by two models: a base model and a trial."""
    from ray_abliterate.evaluation.streaming.reader import TextRequest
    from ray_abliterate.pipeline.progress import SilentProgress
    from ray_abliterate.pipeline.suite_runner import BASE_MODEL, MeasuredModel
    from ray_abliterate.pipeline.text_evaluation import TextEvaluation
    from ray_abliterate.search.plan import Plan

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("made up")
        subjects = (BASE_MODEL, MeasuredModel("trial-0", Plan.nothing()))
        request, model = TextRequest(str(text), carry=carry), {"name": "timed", "weights": ""}
        to, started = Path(scratch) / "results", time.perf_counter()
        evaluation = TextEvaluation(pool, None, to, SilentProgress())
        results = evaluation.read(request, subjects, model)
        seconds = time.perf_counter() - started
    assert [totals.chunks for totals in results.totals.values()] == [CHUNKS, CHUNKS]
    return seconds


def suite_seconds(pool: Any) -> float:
    """Return the seconds of as many chunks of a suite."""
    from benchmarks.harness.stand_ins import TimedReader
    from ray_abliterate.evaluation.suites.suite import Chunk
    from ray_abliterate.pipeline.suite_runner import AHEAD

    calls = ((None, Chunk("suite", str(i), "", ()), None, None) for i in range(CHUNKS))
    started = time.perf_counter()
    results = list(pool.map(TimedReader.measure, calls, AHEAD * pool.replicas))
    seconds = time.perf_counter() - started
    assert len(results) == CHUNKS
    return seconds


def evaluation_pool_table(figures: Figures) -> list[str]:
    """Return seconds by the number of readers, and how many times as fast as one they are."""
    one = figures["rows"][0]
    ideal = figures["chunks"] * figures["seconds"]

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1f} s ({one[name] / row[name]:.2f} x)"

    columns = {
        "readers": lambda row: row["readers"],
        f"independent chunks (two models; {2 * ideal:.1f} s by one reader without overhead)": (
            lambda row: cell(row, "apart")
        ),
        "in order (one reader a model)": lambda row: cell(row, "in_order"),
        f"a suite ({ideal:.1f} s)": lambda row: cell(row, "suite"),
    }
    return column_table(columns, figures["rows"])


CLAIM = Claim(
    "evaluation_pool",
    "How much faster a long text and a suite are read by more readers.",
    "evaluation_pool",
    {"evaluation-pool": evaluation_pool_table},
)

if __name__ == "__main__":
    main()
