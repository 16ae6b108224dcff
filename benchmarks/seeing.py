"""Seconds and memory of looking at residuals, and of comparing methods, from files.

    OMP_NUM_THREADS=1 python -m benchmarks.seeing [--layers 80] [--hidden 8192] [--prompts 400]

Synthetic residuals of two sets in shard files, as a run keeps them; noise about a mean, and a shift
that grows over the layers. `residuals` is everything that `ray-abliterate residuals` does but the
page itself: checksums, then layer by layer planes, geometry and held-out coordinates; the page is
timed apart. `directions` compares methods over some of the layers (`--compared`), since each layer
costs the same; its time is given a layer. Memory is the process's peak (resident set), less what it
held before the first layer; mapped pages of the files count as long as the system lets them stay,
so it is beside the files' size that it says something.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import save

ROWS = 64
COMPARED = ("mean-difference", "geometric-median", "whitened", "logistic-probe")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=400, help="of each set")
    parser.add_argument(
        "--compared", type=int, default=1, help="layers that methods are compared at"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.layers, options.hidden, options.prompts)
        figures = measure(Path(folder), options.layers, options.prompts, options.compared)
    shape = {key: getattr(options, key) for key in ("layers", "hidden", "prompts", "compared")}
    print(save("seeing", {**shape, "file_bytes": size, **figures}))


def measure(folder: Path, layers: int, prompts: int, compared: int) -> dict[str, Any]:
    """Seconds of each part, and peak bytes."""
    from ray_abliterate.comparison import compare
    from ray_abliterate.recipe import DirectionSettings
    from ray_abliterate.residuals_page import residuals_page
    from ray_abliterate.views import views

    views_of = DirectionSettings()
    list(views(*(Few(found, 1) for found in opened(folder, prompts)), views_of))  # libraries
    before, seconds = peak(), {}
    started = time.perf_counter()
    sets = opened(folder, prompts)
    seconds["checksums"] = time.perf_counter() - started
    found = []
    for view in views(*sets, views_of):
        found.append(view)
        print(f"\rlayer {len(found)} of {layers}", end="", flush=True)
    seconds["residuals"] = time.perf_counter() - started
    added = peak() - before
    started = time.perf_counter()
    page = residuals_page(found, "synthetic", "mean-difference", 0, {}, None).html()
    seconds["page"] = time.perf_counter() - started
    print()
    methods = {name: DirectionSettings(method=name) for name in COMPARED}
    times: list[float] = []
    started = time.perf_counter()
    compare(
        *(Few(part, compared) for part in sets), methods, 2,
        step=lambda done, total: times.append(time.perf_counter() - started),
    )  # fmt: skip
    seconds["directions_a_layer"] = times[compared - 1] / compared
    seconds["stability"] = times[-1] - times[compared - 1]
    figures = {"seconds": {name: round(value, 2) for name, value in seconds.items()}}
    found = {**figures, "added_bytes": added, "page_bytes": len(page), "methods": list(COMPARED)}
    print(found)
    return found


class Few:
    """The first layers of a set."""

    def __init__(self, stored: Any, layers: int) -> None:
        self.stored, self.layers = stored, layers

    def layer(self, index: int) -> Any:
        """One of them."""
        return self.stored.layer(index)


def opened(folder: Path, prompts: int) -> tuple[Any, Any]:
    """Both sets, checksums compared."""
    from ray_abliterate.shard_files import ShardFolder
    from ray_abliterate.stored import StoredSet

    count = -(-prompts // ROWS)
    found = [
        StoredSet(list(ShardFolder(folder).mapped(name, "key", count)))
        for name in ("behaviour", "neutral")
    ]
    return found[0], found[1]


def write(folder: Path, layers: int, hidden: int, prompts: int) -> int:
    """Shards of both sets; returns bytes."""
    import numpy

    from ray_abliterate.shard_files import ShardFolder
    from ray_abliterate.shards import ResidualShard

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


def peak() -> int:
    """Most bytes that this process ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
