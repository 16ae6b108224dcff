"""What two sets of residuals look like after every block: planes, held-out coordinates, numbers.

Read one layer at a time. Knows nothing about models, files or figures.
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
    """Both sets after one block.

    Attributes:
        layer: The block.
        first: How many prompts are the behaviour's; they come first.
        components: Along the two leading principal components.
        components_shares: How much of the variance these are.
        gap: Along the difference of means, and the leading component of what that leaves.
        gap_shares: How much of the variance these are.
        geometry: Lengths, angles and distances.
        held_out: Every prompt along a direction found without it; None without a direction.
        measures: How well those tell the sets apart.
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
    """One view a layer.

    Args:
        behaviour: Residuals of prompts that show the behaviour.
        neutral: Of prompts that don't.
        settings: The method whose direction prompts are measured along.
        seed: Decides the halves.
    """
    before: LayerView | None = None
    for index in range(behaviour.layers):
        rows = [
            winsorized(values[evenly_spaced_indices(len(values))], settings.winsorize_quantile)
            for values in (s.layer(index) for s in (behaviour, neutral))
        ]
        before = _view(index, rows[0], rows[1], settings, seed, before)
        yield before


def misplaced_prompts(view: LayerView) -> tuple[tuple[str, int, float], ...]:
    """Prompts that lie nearer to the other set's mean than to their own, the farthest first.

    Set, number of the prompt among those that are looked at, and how far beyond the middle of the
    two means it lies along the held-out direction, in units of half their distance: beyond 1 it is
    farther over than the other set's mean. Such a prompt may be in the wrong set.
    """
    if view.held_out is None:
        return ()
    sides = {"behaviour": view.held_out.behaviour, "neutral": view.held_out.neutral}
    means = {name: float(side.mean()) for name, side in sides.items()}
    middle = 0.5 * sum(means.values())
    found = []
    for name, side in sides.items():
        half = means[name] - middle
        beyond = (middle - side) / half if half else 0 * side
        found += [(name, int(i), float(beyond[i])) for i in (beyond > 0).nonzero()[0]]
    return tuple(sorted(found, key=lambda one: -one[2]))


def _view(
    index: int,
    behaviour: LayerValues,
    neutral: Float[numpy.ndarray, "other hidden"],
    settings: DirectionSettings,
    seed: int,
    before: LayerView | None,
) -> LayerView:
    scene = InnerProducts.of(behaviour, neutral)
    sets = ContrastSets(*(torch.from_numpy(numpy.array(values)) for values in (behaviour, neutral)))
    found = (
        measure_held_out(sets, settings, random_halves(sets.counts, seed)) if sets.differ else None
    )
    known = found if isinstance(found, HeldOut) else None
    components, components_shares = scene.principal()
    gap, gap_shares = scene.along_the_gap()
    return LayerView(
        layer=index,
        first=len(behaviour),
        components=keep_orientation(components, before.components if before else None),
        components_shares=components_shares,
        gap=keep_orientation(gap, before.gap if before else None),
        gap_shares=gap_shares,
        geometry=scene.geometry(),
        held_out=known,
        measures=known.measures() if known else {**CHANCE_LEVEL, "agreement": 0.0},
    )
