"""Seconds and memory of analysing stored residuals, and of comparing methods on them.

    OMP_NUM_THREADS=1 python -m benchmarks.residual_pages
        [--layers 80] [--hidden 8192] [--prompts 400]

Synthetic residuals of two sets in shard files, as a run stores them; noise about a mean, and a
shift that grows over the layers. `residuals` is everything that `ray-abliterate residuals` does but
the page itself: checksums, then layer by layer planes, geometry and held-out coordinates; the page
is timed apart. `directions` compares methods over some of the layers (`--compared`), since each
layer costs the same; its time is given per layer. Memory is the most that the process held of its
own (not of the mapped files, whose pages the system takes back when it likes), sampled 50 times a
second, less what it held before.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.memory import PeakMemory, anonymous_bytes
from benchmarks.harness.tables import gigabytes, table
from benchmarks.harness.worker_process import call_in_new_process

ROWS = 64
"""Prompts of a shard."""
COMPARED_METHODS = ("mean-difference", "geometric-median", "whitened", "logistic-probe")


def main() -> None:
    """Write shard files, measure in a new process, print, save."""
    parser = CLAIM.parser(layers=3, hidden=64, prompts=60)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=400, help="prompts of each set")
    parser.add_argument(
        "--compared", type=int, default=1, help="layers at which methods are compared"
    )
    options = parser.parse_args()
    shape = {key: getattr(options, key) for key in ("layers", "hidden", "prompts", "compared")}
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(Path(folder), options.layers, options.hidden, options.prompts)
        measured = call_in_new_process(
            measure, folder, options.layers, options.prompts, options.compared
        )
    CLAIM.save({**shape, "file_bytes": size, **measured}, options)
    print(measured)


def measure(folder: str, layers: int, prompts: int, compared: int) -> dict[str, Any]:
    """Return the seconds of each part, and peak bytes.

    Args:
        folder: Shard files of both sets.
        layers: Layers of the residuals.
        prompts: Prompts of each set.
        compared: Layers at which methods are compared.
    """
    from ray_abliterate.directions.comparison.compare import compare_methods
    from ray_abliterate.directions.layer_views import view_layers
    from ray_abliterate.pipeline.residual_analysis import ResidualAnalysis
    from ray_abliterate.recipe import DirectionSettings
    from ray_abliterate.report.residuals_page import residuals_page

    settings = DirectionSettings()
    list(view_layers(*tiny_sets(), settings))  # loads libraries
    seconds, views = {}, []
    with PeakMemory(anonymous_bytes, interval_seconds=0.02) as memory:
        started = time.perf_counter()
        sets = open_sets(Path(folder), prompts)
        seconds["checksums"] = time.perf_counter() - started
        for view in view_layers(*sets, settings):
            views.append(view)
            print(f"\rlayer {len(views)} of {layers}", end="", flush=True, file=sys.stderr)
        seconds["residuals"] = time.perf_counter() - started
    started = time.perf_counter()
    page = residuals_page(
        ResidualAnalysis(tuple(views), 0, None, {}), "synthetic", "mean-difference"
    ).html()
    seconds["page"] = time.perf_counter() - started
    print(file=sys.stderr)
    methods = {name: DirectionSettings(method=name) for name in COMPARED_METHODS}
    times: list[float] = []  # at the end of each layer, then of each step of stability
    started = time.perf_counter()
    behaviour, neutral = (FirstLayers(part, compared) for part in sets)
    step = lambda done, total: times.append(time.perf_counter() - started)  # noqa: E731
    compare_methods(behaviour, neutral, methods, 2, step=step)
    seconds["directions_a_layer"] = times[compared - 1] / compared
    seconds["stability"] = times[-1] - times[compared - 1]
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "added_bytes": memory.added,
        "page_bytes": len(page),
        "methods": list(COMPARED_METHODS),
    }


class FirstLayers:
    """The first layers of a stored set, as a set of its own."""

    def __init__(self, stored: Any, layers: int) -> None:
        self.stored, self.layers = stored, layers

    def layer(self, index: int) -> Any:
        """Return the residuals of one layer, `"prompt hidden"`."""
        return self.stored.layer(index)


def open_sets(folder: Path, prompts: int) -> tuple[Any, Any]:
    """Return both sets after comparing their checksums."""
    from ray_abliterate.directions.residuals.shard_files import ShardFolder
    from ray_abliterate.pipeline.stored_residuals import StoredSet

    count = -(-prompts // ROWS)
    behaviour, neutral = (
        StoredSet(list(ShardFolder(folder).map_all(name, "key", count)))
        for name in ("behaviour", "neutral")
    )
    return behaviour, neutral


def write_shards(folder: Path, layers: int, hidden: int, prompts: int) -> int:
    """Write the shards of both sets and return their bytes."""
    import numpy

    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.directions.residuals.shard_files import ShardFolder

    random, total = numpy.random.default_rng(0), 0
    mean = 10 * random.standard_normal((layers, hidden), numpy.float32)
    shift = random.standard_normal((layers, hidden), numpy.float32)
    shift *= 8 * numpy.linspace(0, 1, layers, dtype=numpy.float32)[:, None] / hidden**0.5
    for name, sign in (("behaviour", 1), ("neutral", 0)):
        for number, first in enumerate(range(0, prompts, ROWS)):
            count = min(ROWS, prompts - first)
            values = random.standard_normal((count, layers, hidden), numpy.float32)
            values += mean + sign * shift
            data = ResidualShard.of(name, first, values).to_file("key")
            ShardFolder(folder).file(name, number).write_bytes(data)
            total += len(data)
    return total


def tiny_sets() -> tuple[Any, Any]:
    """Return two sets of eight prompts, one layer and 16 units."""
    import numpy

    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.pipeline.stored_residuals import StoredSet

    values = numpy.random.default_rng(0).standard_normal((8, 1, 16)).astype(numpy.float32)
    behaviour, neutral = (
        StoredSet([ResidualShard.of("small", 0, values + shift)]) for shift in (0, 1)
    )
    return behaviour, neutral


def residual_pages_table(figures: Figures) -> list[str]:
    """Return seconds and memory of analysing residuals and of comparing methods."""
    seconds = figures["seconds"]
    shape = (
        f"{2 * figures['prompts']:,} prompts × {figures['layers']} layers × "
        f"{figures['hidden']:,} units, {gigabytes(figures['file_bytes'], 1)} GB of files"
    )
    names = ", ".join(f"`{name}`" for name in figures["methods"])
    rows = [
        ("`residuals`: checksums, and all layers", f"{seconds['residuals']:.0f} s"),
        ("of these the checksums", f"{seconds['checksums']:.0f} s"),
        ("the page", f"{seconds['page']:.1f} s, {figures['page_bytes'] / 1e6:.1f} MB"),
        ("memory added by all layers", f"{figures['added_bytes'] / 1e6:,.0f} MB"),
        (f"`directions`, a layer: {names}", f"{seconds['directions_a_layer']:.1f} s"),
        ("their stability, at one layer, 2 pairs a size", f"{seconds['stability']:.1f} s"),
    ]
    return table((shape, ""), rows)


CLAIM = Claim(
    "residual_pages",
    "Seconds and memory of analysing stored residuals, and of comparing methods on them.",
    "seeing",
    {"seeing": residual_pages_table},
)

if __name__ == "__main__":
    main()
