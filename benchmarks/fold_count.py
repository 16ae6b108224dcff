"""How many folds find the layer that separates best, on synthetic layers that hardly differ.

    OMP_NUM_THREADS=1 python -m benchmarks.fold_count

Twelve layers of noise about a shift along one unit, larger in one layer than in the others; the
difference of means, measured in so many folds. Says how often that layer has the highest AUROC,
and what the AUROC of layers without any shift is: mean and standard deviation.
"""

import argparse
from typing import Any

from benchmarks.harness.record import save

SIZES = ((20, 1000, 4.1), (100, 1000, 2.75))
"""Prompts of each set, units, and the larger shift in standard deviations of a unit."""
FOLDS = (2, 3, 5, 10)
LAYERS, PLANTED = 12, 5
SMALLER = 0.85
"""Of the larger shift, in all other layers."""


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    options = parser.parse_args()
    rows = [row for size in SIZES for row in measured(*size, options.draws)]
    print(save("folds", {"draws": options.draws, "layers": LAYERS, "measured": rows}))


def measured(prompts: int, hidden: int, shift: float, draws: int) -> list[dict[str, Any]]:
    """A row for each number of folds."""
    import numpy

    random = numpy.random.default_rng(0)
    found: dict[int, int] = dict.fromkeys(FOLDS, 0)
    nothing: dict[int, list[float]] = {count: [] for count in FOLDS}
    for _ in range(draws):
        areas: dict[int, list[float]] = {count: [] for count in FOLDS}
        for layer in range(LAYERS):
            behaviour, neutral = random.standard_normal((2, prompts, hidden))
            for count in FOLDS if layer == 0 else ():
                nothing[count].append(area(behaviour, neutral, count))
            behaviour[:, 0] += shift * (1 if layer == PLANTED else SMALLER)
            for count in FOLDS:
                areas[count].append(area(behaviour, neutral, count))
        for count, own in areas.items():
            found[count] += own.index(max(own)) == PLANTED
    rows = []
    for count in FOLDS:
        mean, spread = float(numpy.mean(nothing[count])), float(numpy.std(nothing[count]))
        row = {
            "prompts": prompts,
            "hidden": hidden,
            "folds": count,
            "found": round(found[count] / draws, 3),
        }
        rows.append({**row, "nothing_mean": round(mean, 3), "nothing_spread": round(spread, 3)})
        print(rows[-1])
    return rows


def area(behaviour: Any, neutral: Any, count: int) -> float:
    """AUROC of all prompts, each along the difference of means of the other folds."""
    import numpy

    from ray_abliterate.directions.comparison.held_out import centre_folds
    from ray_abliterate.directions.residuals.folds import Folds
    from ray_abliterate.directions.separability import auroc

    own = numpy.arange(len(behaviour)) % count
    along = [numpy.empty(len(behaviour)) for _ in range(2)]
    sums = [values.sum(axis=0) for values in (behaviour, neutral)]
    for fold in range(count):
        inside = own == fold
        others = [
            s - v[inside].sum(axis=0) for s, v in zip(sums, (behaviour, neutral), strict=True)
        ]
        gap = others[0] - others[1]
        vector = gap / numpy.linalg.norm(gap)
        along[0][inside], along[1][inside] = behaviour[inside] @ vector, neutral[inside] @ vector
    return auroc(*centre_folds(along[0], along[1], Folds(count, own, own)))


if __name__ == "__main__":
    main()
