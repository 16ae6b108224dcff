"""Seconds of each direction method for one layer, and how far the planted direction is found.

    OMP_NUM_THREADS=1 python -m benchmarks.methods

Synthetic residuals: two sets that differ along a direction by three standard deviations, among
noise that is ten times stronger along another one; and the same with 2 % of the behaviour's prompts
300 standard deviations off (the outliers). The cosine with the planted direction says what a method
makes of such data, nothing of models.
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks import save

SIZES = ((400, 1024), (400, 4096), (2000, 1024))
"""Prompts of each set, and units."""


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    from ray_abliterate.methods import METHODS

    rows = []
    for name in METHODS:
        for prompts, hidden in SIZES:
            clean, wild = (one(name, prompts, hidden, out, options.rounds) for out in (False, True))
            rows.append(
                {
                    "method": name,
                    "prompts": prompts,
                    "hidden": hidden,
                    "seconds": clean["seconds"],
                    "cosine": clean["cosine"],
                    "cosine_outliers": wild["cosine"],
                }
            )
            print(rows[-1])
    print(save("methods", {"measured": rows}))


def one(name: str, prompts: int, hidden: int, outliers: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and the cosine."""
    import torch

    from ray_abliterate.methods import METHODS, Layer, Sample

    behaviour, neutral, planted = residuals(prompts, hidden, outliers)
    seconds = []
    for _ in range(1 if outliers else rounds):
        layer = Layer(Sample(behaviour, hidden), Sample(neutral, hidden))
        started = time.perf_counter()
        found = layer.find(METHODS[name])[0]
        seconds.append(time.perf_counter() - started)
    cosine = float(torch.nn.functional.normalize(found, dim=0) @ planted)
    return {"seconds": round(statistics.median(seconds), 4), "cosine": round(cosine, 4)}


def residuals(prompts: int, hidden: int, outliers: bool) -> tuple[Any, Any, Any]:
    """Behaviour, neutral, and the planted direction."""
    import torch

    random = torch.Generator().manual_seed(0)
    planted, loud, away = torch.linalg.qr(torch.randn(hidden, 3, generator=random)).Q.T
    sets = []
    for shift in (3.0, 0.0):
        values = torch.randn(prompts, hidden, generator=random) + shift * planted
        values += 10 * torch.randn(prompts, 1, generator=random) * loud
        if outliers and shift:
            values[: prompts // 50] += 300 * away
        sets.append(values)
    return sets[0], sets[1], planted.double()


if __name__ == "__main__":
    main()
