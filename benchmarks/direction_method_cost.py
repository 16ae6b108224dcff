"""Seconds of each direction method for one layer, and how near it comes to the planted direction.

    OMP_NUM_THREADS=1 python -m benchmarks.direction_method_cost

Measured apart are the seconds in which the layer is measured on held-out prompts as a run does it:
directions of all but one fold, each fold projected on its own.

Synthetic residuals: two sets that differ along a direction by three standard deviations, among
noise that is ten times stronger along another one; and the same with 2 % of the behaviour's prompts
300 standard deviations off (the outliers). The cosine with the planted direction says what a method
makes of such data, nothing about models.
"""

import statistics
import time
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import table

SIZES = ((400, 1024), (400, 4096), (2000, 1024))
"""Prompts of each set, and hidden units."""


def main() -> None:
    """Measure every method at every size, print, save."""
    parser = CLAIM.parser(rounds=1, sizes=["60x64"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[f"{prompts}x{hidden}" for prompts, hidden in SIZES],
        help="prompts of each set x hidden units",
    )
    options = parser.parse_args()

    from ray_abliterate.directions.methods.registry import METHODS

    rows = []
    for name in METHODS:
        for size in options.sizes:
            prompts, hidden = map(int, size.split("x"))
            clean = measure(name, draw_sets(prompts, hidden, outliers=False), options.rounds)
            outliers = measure(name, draw_sets(prompts, hidden, outliers=True), 1)
            rows.append(
                {
                    "method": name,
                    "prompts": prompts,
                    "hidden": hidden,
                    "seconds": clean["seconds"],
                    "held_out_seconds": held_out_seconds(name, prompts, hidden),
                    "cosine": clean["cosine"],
                    "cosine_outliers": outliers["cosine"],
                }
            )
            print(rows[-1])
    CLAIM.save({"measured": rows}, options)


def measure(name: str, drawn: tuple[Any, Any, Any], rounds: int) -> dict[str, Any]:
    """Return the median seconds of a method, and the cosine with the planted direction.

    Args:
        name: The method.
        drawn: What `draw_sets` returns.
        rounds: How often the direction is computed.
    """
    import torch

    from ray_abliterate.directions.methods.inputs import Layer, Sample
    from ray_abliterate.directions.methods.registry import METHODS

    behaviour, neutral, planted = drawn
    hidden, seconds = behaviour.shape[1], []
    for _ in range(rounds):
        layer = Layer(Sample(behaviour, hidden), Sample(neutral, hidden))
        started = time.perf_counter()
        vector = layer.find(METHODS[name])[0]
        seconds.append(time.perf_counter() - started)
    cosine = float(torch.nn.functional.normalize(vector, dim=0) @ planted)
    return {"seconds": round(statistics.median(seconds), 4), "cosine": round(cosine, 4)}


def held_out_seconds(name: str, prompts: int, hidden: int) -> float:
    """Return the seconds of measuring one layer, in memory, on held-out prompts.

    Of a method that needs the residuals themselves, those that a run would measure are taken.
    """
    import torch

    from ray_abliterate.directions.comparison.cross_fitting import (
        REDUCIBLE_NEEDS,
        leave_one_fold_out,
    )
    from ray_abliterate.directions.comparison.fitting import ContrastSets
    from ray_abliterate.directions.comparison.held_out import measure_held_out
    from ray_abliterate.directions.methods.recipe_methods import need_of
    from ray_abliterate.directions.residuals.folds import (
        Folds,
        by_fold,
        evenly_spaced_indices,
        project_shard,
    )
    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.recipe import DirectionSettings

    settings = DirectionSettings(method=name)
    sets = draw_sets(prompts, hidden, outliers=False)[:2]
    need = need_of(settings)
    if need not in REDUCIBLE_NEEDS:
        indices = torch.from_numpy(evenly_spaced_indices(prompts))
        sets = tuple(values[indices].contiguous() for values in sets)
    folds = Folds.of(*([(kind, i) for i in range(len(v))] for kind, v in enumerate(sets)))
    assert folds is not None
    batches = [ResidualShard.of("s", 0, values[:, None].numpy()).batch for values in sets]
    started = time.perf_counter()
    if need in REDUCIBLE_NEEDS:
        function, _ = REDUCIBLE_NEEDS[need]
        sides = list(zip(batches, folds.sides, strict=True))
        behaviour, neutral = (by_fold(batch, side, function) for batch, side in sides)
        vectors = leave_one_fold_out(behaviour, neutral, settings, folds)
        assert vectors is not None
        for batch, side in sides:
            project_shard(batch, vectors, side)
    else:
        measure_held_out(ContrastSets(*sets), settings, folds)
    return round(time.perf_counter() - started, 4)


def draw_sets(prompts: int, hidden: int, outliers: bool) -> tuple[Any, Any, Any]:
    """Return behaviour and neutral residuals, `"prompt hidden"`, and the planted direction."""
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


def methods_table(figures: Figures) -> list[str]:
    """Return seconds of each method by size, and its cosines at the last size."""
    rows = {(row["method"], row["prompts"], row["hidden"]): row for row in figures["measured"]}
    sizes = list(dict.fromkeys((prompts, hidden) for _, prompts, hidden in rows))
    heads = (
        f"{what}, 2 × {prompts:,} × {hidden:,}"
        for what in ("s a layer", "held out")
        for prompts, hidden in sizes
    )
    lines = [
        (
            f"`{name}`",
            *(f"{rows[name, *size]['seconds']:.2f}" for size in sizes),
            *(f"{rows[name, *size]['held_out_seconds']:.2f}" for size in sizes),
            f"{rows[name, *sizes[-1]]['cosine']:.2f}",
            f"{rows[name, *sizes[-1]]['cosine_outliers']:.2f}",
        )
        for name in dict.fromkeys(name for name, _, _ in rows)
    ]
    return table(("method", *heads, "cosine", "with outliers"), lines)


CLAIM = Claim(
    "direction_method_cost",
    "Seconds of each direction method for one layer, and how near it comes to a planted direction.",
    "methods",
    {"methods": methods_table},
)

if __name__ == "__main__":
    main()
