"""Seconds of each direction method for one layer, and how far the planted direction is found.

Apart from that, the seconds in which the layer is measured on held-out prompts as a run does it:
directions of all but one fold, each fold along its own.

    OMP_NUM_THREADS=1 python -m benchmarks.direction_method_cost

Synthetic residuals: two sets that differ along a direction by three standard deviations, among
noise that is ten times stronger along another one; and the same with 2 % of the behaviour's prompts
300 standard deviations off (the outliers). The cosine with the planted direction says what a method
makes of such data, nothing of models.
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.harness.record import save

SIZES = ((400, 1024), (400, 4096), (2000, 1024))
"""Prompts of each set, and units."""


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    from ray_abliterate.directions.methods.registry import METHODS

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
                    "held_out_seconds": held_out_seconds(name, prompts, hidden),
                    "cosine": clean["cosine"],
                    "cosine_outliers": wild["cosine"],
                }
            )
            print(rows[-1])
    print(save("methods", {"measured": rows}))


def one(name: str, prompts: int, hidden: int, outliers: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and the cosine."""
    import torch

    from ray_abliterate.directions.methods.inputs import Layer, Sample
    from ray_abliterate.directions.methods.registry import METHODS

    behaviour, neutral, planted = residuals(prompts, hidden, outliers)
    seconds = []
    for _ in range(1 if outliers else rounds):
        layer = Layer(Sample(behaviour, hidden), Sample(neutral, hidden))
        started = time.perf_counter()
        found = layer.find(METHODS[name])[0]
        seconds.append(time.perf_counter() - started)
    cosine = float(torch.nn.functional.normalize(found, dim=0) @ planted)
    return {"seconds": round(statistics.median(seconds), 4), "cosine": round(cosine, 4)}


def held_out_seconds(name: str, prompts: int, hidden: int) -> float:
    """Of one layer, in memory; of a method that wants residuals, those that a run would measure."""
    import torch

    from ray_abliterate.directions import compute
    from ray_abliterate.directions.comparison.cross_fitting import (
        REDUCIBLE_NEEDS,
        leave_one_fold_out,
    )
    from ray_abliterate.directions.comparison.fitting import ContrastSets
    from ray_abliterate.directions.comparison.held_out import measure_held_out
    from ray_abliterate.directions.residuals.folds import (
        Folds,
        by_fold,
        evenly_spaced_indices,
        project_shard,
    )
    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.recipe import DirectionSettings

    settings = DirectionSettings(method=name)
    sets = residuals(prompts, hidden, outliers=False)[:2]
    need = compute.need_of(settings)
    if need not in REDUCIBLE_NEEDS:
        places = torch.from_numpy(evenly_spaced_indices(prompts))
        sets = tuple(values[places].contiguous() for values in sets)
    folds = Folds.of(*([(kind, i) for i in range(len(v))] for kind, v in enumerate(sets)))
    assert folds is not None
    batches = [ResidualShard.of("s", 0, values[:, None].numpy()).batch for values in sets]
    started = time.perf_counter()
    if need in REDUCIBLE_NEEDS:
        function, _ = REDUCIBLE_NEEDS[need]
        sides = list(zip(batches, folds.sides, strict=True))
        parts = [by_fold(batch, own, function) for batch, own in sides]
        vectors = leave_one_fold_out(*parts, settings, folds)
        for batch, own in sides:
            project_shard(batch, vectors, own)
    else:
        measure_held_out(ContrastSets(*sets), settings, folds)
    return round(time.perf_counter() - started, 4)


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
