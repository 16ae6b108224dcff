"""How often so many folds find the layer that separates best, on layers that hardly differ.

    OMP_NUM_THREADS=1 python -m benchmarks.fold_count

Synthetic data: twelve layers of noise about a shift along one unit, larger in one layer than in the
others; the difference of means, measured in so many folds. The figures say how often that layer has
the highest AUROC, and what the AUROC of layers without any shift is: mean and standard deviation.
"""

from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import table

SIZES = ((20, 1000, 4.1), (100, 1000, 2.75))
"""Prompts of each set, hidden units, and the larger shift in standard deviations of a unit."""
FOLDS = (2, 3, 5, 10)
LAYERS, PLANTED_LAYER = 12, 5
SMALLER_SHIFT = 0.85
"""The shift in all other layers, as a share of the larger one."""


def main() -> None:
    """Measure how often the planted layer is found, print, save."""
    parser = CLAIM.parser(draws=2)
    parser.add_argument("--draws", type=int, default=400, help="data sets of each size")
    options = parser.parse_args()
    rows = [row for size in SIZES for row in measure(*size, options.draws)]
    CLAIM.save({"draws": options.draws, "layers": LAYERS, "measured": rows}, options)


def measure(prompts: int, hidden: int, shift: float, draws: int) -> list[dict[str, Any]]:
    """Return a row for each number of folds."""
    import numpy

    random = numpy.random.default_rng(0)
    hits: dict[int, int] = dict.fromkeys(FOLDS, 0)
    noise_areas: dict[int, list[float]] = {count: [] for count in FOLDS}
    for _ in range(draws):
        areas: dict[int, list[float]] = {count: [] for count in FOLDS}
        for layer in range(LAYERS):
            behaviour, neutral = random.standard_normal((2, prompts, hidden))
            for count in FOLDS if layer == 0 else ():
                noise_areas[count].append(held_out_auroc(behaviour, neutral, count))
            behaviour[:, 0] += shift * (1 if layer == PLANTED_LAYER else SMALLER_SHIFT)
            for count in FOLDS:
                areas[count].append(held_out_auroc(behaviour, neutral, count))
        for count, by_layer in areas.items():
            hits[count] += by_layer.index(max(by_layer)) == PLANTED_LAYER
    rows = []
    for count in FOLDS:
        row = {
            "prompts": prompts,
            "hidden": hidden,
            "folds": count,
            "found": round(hits[count] / draws, 3),
            "nothing_mean": round(float(numpy.mean(noise_areas[count])), 3),
            "nothing_spread": round(float(numpy.std(noise_areas[count])), 3),
        }
        rows.append(row)
        print(row)
    return rows


def held_out_auroc(behaviour: Any, neutral: Any, count: int) -> float:
    """Return the AUROC of all prompts, each projected on the difference of means of other folds.

    Args:
        behaviour: Residuals of one set, `"prompt hidden"`.
        neutral: Residuals of the other, of the same shape.
        count: Number of folds.
    """
    import numpy

    from ray_abliterate.directions.comparison.held_out import centre_folds
    from ray_abliterate.directions.residuals.folds import Folds
    from ray_abliterate.directions.separability import auroc

    fold_of = numpy.arange(len(behaviour)) % count  # (prompt,)
    projections = [numpy.empty(len(behaviour)) for _ in range(2)]
    sums = [values.sum(axis=0) for values in (behaviour, neutral)]  # (hidden,) each
    for fold in range(count):
        inside = fold_of == fold
        others = [
            s - v[inside].sum(axis=0) for s, v in zip(sums, (behaviour, neutral), strict=True)
        ]
        gap = others[0] - others[1]  # both sets leave out as many: sums serve as well as means
        direction = gap / numpy.linalg.norm(gap)
        projections[0][inside] = behaviour[inside] @ direction
        projections[1][inside] = neutral[inside] @ direction
    return auroc(*centre_folds(projections[0], projections[1], Folds(count, fold_of, fold_of)))


def folds_table(figures: Figures) -> list[str]:
    """Return how often each number of folds finds the layer, by size."""
    rows_by_key = {
        (row["prompts"], row["hidden"], row["folds"]): row for row in figures["measured"]
    }
    sizes = list(dict.fromkeys((prompts, hidden) for prompts, hidden, _ in rows_by_key))
    lines = []
    for count in dict.fromkeys(folds for _, _, folds in rows_by_key):
        rows = [rows_by_key[*size, count] for size in sizes]
        noise = (f"{row['nothing_mean']:.2f} ± {row['nothing_spread']:.2f}" for row in rows)
        lines.append((count, *(f"{row['found']:.0%}" for row in rows), *noise))
    heads = (
        f"{what}, 2 × {prompts} × {hidden:,}"
        for what in ("layer found", "AUROC of noise")
        for prompts, hidden in sizes
    )
    return table(("folds", *heads), lines)


CLAIM = Claim(
    "fold_count",
    "How often 2 to 10 folds find the layer that separates best, on layers that hardly differ.",
    "folds",
    {"folds": folds_table},
)

if __name__ == "__main__":
    main()
