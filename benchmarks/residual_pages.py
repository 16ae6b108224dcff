"""Seconds and memory of looking at residuals, and of comparing methods, from files.

    OMP_NUM_THREADS=1 python -m benchmarks.residual_pages
        [--layers 80] [--hidden 8192] [--prompts 400]

Synthetic residuals of two sets in shard files, as a run keeps them; noise about a mean, and a shift
that grows over the layers. `residuals` is everything that `ray-abliterate residuals` does but the
page itself: checksums, then layer by layer planes, geometry and held-out coordinates; the page is
timed apart. `directions` compares methods over some of the layers (`--compared`), since each layer
costs the same; its time is given a layer. Memory is the most that the process held of its own (not
of the mapped files, whose pages the system takes back when it likes), sampled 50 times a second,
less what it held before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save

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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measured = measure(Path(options.one), options.layers, options.prompts, options.compared)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.layers, options.hidden, options.prompts)
        command = [
            sys.executable,
            "-m",
            "benchmarks.residual_pages",
            *sys.argv[1:],
            "--one",
            folder,
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout)
    shape = {key: getattr(options, key) for key in ("layers", "hidden", "prompts", "compared")}
    print(save("seeing", {**shape, "file_bytes": size, **figures}))


def measure(folder: Path, layers: int, prompts: int, compared: int) -> dict[str, Any]:
    """Seconds of each part, and peak bytes."""
    from ray_abliterate.directions.comparison.compare import compare_methods
    from ray_abliterate.directions.layer_views import view_layers
    from ray_abliterate.recipe import DirectionSettings
    from ray_abliterate.report.residuals_page import residuals_page

    views_of = DirectionSettings()
    list(view_layers(*small(), views_of))  # libraries
    seconds, found = {}, []
    with most_held() as held:
        started = time.perf_counter()
        sets = opened(folder, prompts)
        seconds["checksums"] = time.perf_counter() - started
        for view in view_layers(*sets, views_of):
            found.append(view)
            print(f"\rlayer {len(found)} of {layers}", end="", flush=True, file=sys.stderr)
        seconds["residuals"] = time.perf_counter() - started
    started = time.perf_counter()
    page = residuals_page(found, "synthetic", "mean-difference", 0, {}, None).html()
    seconds["page"] = time.perf_counter() - started
    print(file=sys.stderr)
    methods = {name: DirectionSettings(method=name) for name in COMPARED}
    times: list[float] = []
    started = time.perf_counter()
    compare_methods(
        *(Few(part, compared) for part in sets), methods, 2,
        step=lambda done, total: times.append(time.perf_counter() - started),
    )  # fmt: skip
    seconds["directions_a_layer"] = times[compared - 1] / compared
    seconds["stability"] = times[-1] - times[compared - 1]
    figures = {"seconds": {name: round(value, 2) for name, value in seconds.items()}}
    added = max(held) - held[0]
    return {**figures, "added_bytes": added, "page_bytes": len(page), "methods": list(COMPARED)}


class Few:
    """The first layers of a set."""

    def __init__(self, stored: Any, layers: int) -> None:
        self.stored, self.layers = stored, layers

    def layer(self, index: int) -> Any:
        """One of them."""
        return self.stored.layer(index)


def opened(folder: Path, prompts: int) -> tuple[Any, Any]:
    """Both sets, checksums compared."""
    from ray_abliterate.directions.residuals.shard_files import ShardFolder
    from ray_abliterate.pipeline.stored_residuals import StoredSet

    count = -(-prompts // ROWS)
    found = [
        StoredSet(list(ShardFolder(folder).mapped(name, "key", count)))
        for name in ("behaviour", "neutral")
    ]
    return found[0], found[1]


def write(folder: Path, layers: int, hidden: int, prompts: int) -> int:
    """Shards of both sets; returns bytes."""
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


def small() -> tuple[Any, Any]:
    """Two sets of hardly anything."""
    import numpy

    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.pipeline.stored_residuals import StoredSet

    values = numpy.random.default_rng(0).standard_normal((8, 1, 16)).astype(numpy.float32)
    found = [StoredSet([ResidualShard.of("small", 0, values + shift)]) for shift in (0, 1)]
    return found[0], found[1]


@contextmanager
def most_held() -> Iterator[list[int]]:
    """Bytes that the process holds of its own, at the start and 50 times a second."""
    held, over = [own_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            held.append(own_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()


def own_bytes() -> int:
    """Resident memory that maps no file (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
