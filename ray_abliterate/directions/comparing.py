"""How directions compare: methods with each other, layers with each other, and with chance.

Plain functions of directions and residuals that give plain values, for tables and figures.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy
import torch

from ray_abliterate.directions.finding import from_layers
from ray_abliterate.directions.value import Directions, NoDirection
from ray_abliterate.methods import Layer, Sample
from ray_abliterate.recipe import DirectionSettings


def between_methods(found: Mapping[str, Directions]) -> list[dict[str, Any]]:
    """Cosine of each pair of methods in each layer; None where one of them has no direction.

    Raises:
        ValueError: directions of different models.
    """
    rows = []
    for one, other in combinations(found, 2):
        a, b = found[one], found[other]
        if a.vectors.shape != b.vectors.shape:
            raise ValueError(f"{one} and {other} are directions of different models")
        for layer in range(a.layers):
            both = a.usable[layer] and b.usable[layer]
            cosine = float(a.vectors[layer].double() @ b.vectors[layer].double())
            rows.append(
                {"layer": layer, "methods": (one, other), "cosine": cosine if both else None}
            )
    return rows


def between_layers(found: Directions) -> list[list[float]]:
    """Cosine of each layer's direction with each other's; 0 where a layer has none."""
    vectors = found.vectors.double()
    rows: list[list[float]] = (vectors @ vectors.T).tolist()
    return rows


def stability(
    layer: Layer, settings: DirectionSettings, rounds: int = 20, seed: int = 0
) -> dict[str, float] | None:
    """How much one layer's direction hangs on which prompts there were: a bootstrap.

    Prompts of each set are drawn with replacement, and directions computed from them. Draws hold
    some prompts twice, so methods that single prompts decide look a little worse than they are.

    Args:
        layer: All residuals of both sets after one block (`Sample`), winsorised if they are to be.
        settings: The method.
        rounds: How often.
        seed: Of the draws.

    Returns:
        `cosine`, the median cosine with the direction that all prompts give, and its 5 % and 95 %
        quantiles, `low` and `high`; None if the layer has no direction.
    """
    try:
        whole = from_layers([layer], settings, {}).vectors[0].double()
    except NoDirection:
        return None
    random = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(rounds):
        drawn = Layer(_drawn(layer.behaviour, random), _drawn(layer.neutral, random))
        cosines.append(float(from_layers([drawn], settings, {}).vectors[0].double() @ whole))
    low, middle, high = numpy.quantile(cosines, [0.05, 0.5, 0.95]).tolist()
    return {"cosine": middle, "low": low, "high": high}


def _drawn(sample: Sample, random: torch.Generator) -> Sample:
    chosen = torch.randint(sample.count, (sample.count,), generator=random)
    return Sample(sample.values[chosen], sample.width)
