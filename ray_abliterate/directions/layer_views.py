"""Views of two sets of residuals after every block: planes, held-out coordinates, numbers.

Reads one layer at a time. Knows nothing about models, files or figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.directions.comparison.compare import LayerwiseResiduals
from ray_abliterate.directions.comparison.fitting import ContrastSets
from ray_abliterate.directions.comparison.held_out import HeldOut, measure_held_out, random_halves
from ray_abliterate.directions.geometry import InnerProducts, Plane, SetGeometry, keep_orientation
from ray_abliterate.directions.residuals.folds import evenly_spaced_indices
from ray_abliterate.directions.residuals.shard import LayerValues, winsorized
from ray_abliterate.directions.separability import CHANCE_LEVEL
from ray_abliterate.recipe import DirectionSettings


@dataclass(frozen=True)
class LayerView:
    """Both sets after one block, for one layer of the page and of `residuals.json`.

    Attributes:
        layer: The block.
        first: The number of the behaviour's prompts, which come first.
        components: Coordinates along the two leading principal components.
        components_shares: Shares of the variance along these.
        gap: Coordinates along the difference of means, and the leading component of the rest.
        gap_shares: Shares of the variance along these.
        geometry: Lengths, angles and distances.
        held_out: Every prompt along a direction found without it; None without a direction.
        measures: How well those coordinates separate the sets.
    """

    layer: int
    first: int
    components: Plane
    components_shares: tuple[float, float]
    gap: Plane
    gap_shares: tuple[float, float]
    geometry: SetGeometry
    held_out: HeldOut | None
    measures: dict[str, float]


def view_layers(
    behaviour: LayerwiseResiduals,
    neutral: LayerwiseResiduals,
    settings: DirectionSettings,
    seed: int = 0,
) -> Iterator[LayerView]:
    """Yield one view for each layer.

    Args:
        behaviour: Residuals of prompts that show the behaviour.
        neutral: Residuals of prompts that don't.
        settings: The method whose direction prompts are measured along.
        seed: Decides the halves.
    """
    view: LayerView | None = None
    for index in range(behaviour.layers):
        rows = [
            winsorized(values[evenly_spaced_indices(len(values))], settings.winsorize_quantile)
            for values in (s.layer(index) for s in (behaviour, neutral))
        ]
        view = _view_layer(index, rows[0], rows[1], settings, seed, view)
        yield view


def misplaced_prompts(view: LayerView) -> tuple[tuple[str, int, float], ...]:
    """Return prompts that lie nearer to the other set's mean than to their own, the farthest first.

    Such a prompt may be in the wrong set.

    Returns:
        For each, its set, its number among the prompts that were read, and how far beyond the
        midpoint of the two means it lies along the held-out direction, in units of half their
        distance: above 1 it lies beyond the other set's mean.
    """
    if view.held_out is None:
        return ()
    sides = {"behaviour": view.held_out.behaviour, "neutral": view.held_out.neutral}
    means = {name: float(side.mean()) for name, side in sides.items()}
    midpoint = 0.5 * sum(means.values())
    misplaced: list[tuple[str, int, float]] = []
    for name, side in sides.items():
        half = means[name] - midpoint
        beyond = (midpoint - side) / half if half else 0 * side  # (prompt)
        misplaced += [(name, int(i), float(beyond[i])) for i in (beyond > 0).nonzero()[0]]
    return tuple(sorted(misplaced, key=lambda prompt: -prompt[2]))


def _view_layer(
    index: int,
    behaviour: LayerValues,
    neutral: Float[numpy.ndarray, "other hidden"],
    settings: DirectionSettings,
    seed: int,
    before: LayerView | None,
) -> LayerView:
    products = InnerProducts.of(behaviour, neutral)
    sets = ContrastSets(*(torch.from_numpy(numpy.array(values)) for values in (behaviour, neutral)))
    held_out = None
    if sets.means_differ:
        measured = measure_held_out(sets, settings, random_halves(sets.counts, seed))
        held_out = measured if isinstance(measured, HeldOut) else None
    components, components_shares = products.principal_plane()
    gap, gap_shares = products.mean_difference_plane()
    return LayerView(
        layer=index,
        first=len(behaviour),
        components=keep_orientation(components, before.components if before else None),
        components_shares=components_shares,
        gap=keep_orientation(gap, before.gap if before else None),
        gap_shares=gap_shares,
        geometry=products.geometry(),
        held_out=held_out,
        measures=held_out.measures() if held_out else {**CHANCE_LEVEL, "agreement": 0.0},
    )
