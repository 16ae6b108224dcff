"""Computes directions: a recipe's method on every layer, made unit vectors that spare the neutral.

Whole sets, sums, and layers that come one at a time all end here. Knows nothing about models.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.directions import VANISHING, Directions
from ray_abliterate.directions.methods.inputs import (
    TINY,
    Average,
    Layer,
    Sample,
    StreamVectors,
    Summary,
    Warn,
    demand_of,
)
from ray_abliterate.directions.methods.principal_components import neutral_components
from ray_abliterate.directions.methods.recipe_methods import need_of, weighted_methods
from ray_abliterate.directions.residuals.moments import Moments
from ray_abliterate.directions.residuals.residual_set import LayerVectors, Residuals
from ray_abliterate.directions.residuals.shard import Sums
from ray_abliterate.recipe import DirectionSettings

log = logging.getLogger(__name__)

LayerStack = Float[Tensor, "layer rank hidden"]


def directions_from_residuals(
    behaviour: Residuals,
    neutral: Residuals,
    settings: DirectionSettings,
    warn: Warn = log.warning,
) -> Directions:
    """Compute the directions that the recipe asks for from whole sets.

    Residuals are winsorised if asked, the method gives raw vectors, what is to be spared of the
    neutral residuals is projected out if asked (so that the ablation leaves it alone), and the rest
    is scaled to unit length; all in float64, rounded once.

    Raises:
        ValueError: the shapes differ, or no layer has a direction.
    """
    if behaviour.values.shape[1:] != neutral.values.shape[1:]:
        raise ValueError(
            f"residuals of different models: {tuple(behaviour.values.shape)} and "
            f"{tuple(neutral.values.shape)} (prompt, layer, hidden)"
        )
    behaviour = behaviour.winsorized(settings.winsorize_quantile)
    neutral = neutral.winsorized(settings.winsorize_quantile)
    origin = {"behaviour": behaviour.fingerprint, "neutral": neutral.fingerprint}
    if need_of(settings) == "means":
        counts = len(behaviour.values), len(neutral.values)
        averages = _averages(counts, behaviour.mean(), neutral.mean())
        return directions_from_layers(averages, settings, origin, warn)
    hidden = behaviour.values.shape[2]
    layers = (
        Layer(*(Sample(s.values[:, index].contiguous(), hidden) for s in (behaviour, neutral)))
        for index in range(behaviour.layers)
    )
    return directions_from_layers(layers, settings, origin, warn)


def directions_from_sums(
    behaviour: Sums,
    neutral: Sums,
    settings: DirectionSettings,
    origin: Mapping[str, str],
    warn: Warn = log.warning,
) -> Directions:
    """Compute directions from sums of winsorised residuals, for methods that need means alone.

    The means differ from those of whole sets by float64 rounding, the directions of
    `directions_from_residuals` by at most one rounding to float32.

    Raises:
        ValueError: the shapes differ, or no layer has a direction.
    """
    means = torch.from_numpy(behaviour.mean), torch.from_numpy(neutral.mean)
    averages = _averages((behaviour.prompts, neutral.prompts), *means)
    return directions_from_layers(averages, settings, origin, warn)


def directions_from_moments(
    behaviour: Moments,
    neutral: Moments,
    settings: DirectionSettings,
    origin: Mapping[str, str],
    warn: Warn = log.warning,
) -> Directions:
    """Compute directions from moments of winsorised residuals, for methods that need variances.

    Raises:
        ValueError: no layer has a direction.
    """
    layers = (
        Layer(Summary(behaviour.layer(index)), Summary(neutral.layer(index)))
        for index in range(len(behaviour.mean))
    )
    return directions_from_layers(layers, settings, origin, warn)


def directions_from_layers(
    layers: Iterable[Layer],
    settings: DirectionSettings,
    origin: Mapping[str, str],
    warn: Warn = log.warning,
) -> Directions:
    """Compute directions from layers of which one at a time is in memory.

    Args:
        layers: What the methods need of both sets, layer by layer.
        settings: The methods, and what is spared.
        origin: Fingerprints of the two prompt sets, and what else the layers came from.
        warn: Receives a sentence for each layer without a direction of its own.

    Raises:
        ValueError: no layer has a direction, or a method returned something else than vectors.
    """
    raw, means = list[StreamVectors](), list[tuple[Tensor, Tensor]]()
    components = list[StreamVectors]()
    for layer in layers:
        raw.append(_raw_vectors(layer, settings))
        means.append((layer.behaviour.mean, layer.neutral.mean))
        if count := settings.project_out_components:
            components.append(layer.find(_leading_neutral, count=count))
    rank = max(len(rows) for rows in raw)
    # layers may have found fewer vectors than others: rows of zeros make up for them
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows))) for rows in raw]
    behaviour, neutral = (torch.stack(side) for side in zip(*means, strict=True))
    spared = _spared_vectors(neutral, settings.project_out_neutral, components)
    scale = torch.maximum(behaviour.norm(dim=-1), neutral.norm(dim=-1))  # (layer)
    lead, *others = _orthonormal(torch.stack(padded), scale, spared, warn).unbind(dim=1)
    return Directions(
        lead.float(),
        settings.method,
        origin,
        torch.stack(others, dim=1).float() if others else None,
        _normalised(neutral).float() if settings.biproject else None,
    )


def _leading_neutral(behaviour: Any, neutral: Any, count: int) -> StreamVectors:
    """Return leading components of the neutral prompts, as many as their span has at most."""
    return neutral_components(behaviour, neutral, count=min(count, len(neutral.mean)))


_leading_neutral.demand = demand_of(neutral_components)  # type: ignore[attr-defined]


def _averages(
    counts: tuple[int, int], behaviour: LayerVectors, neutral: LayerVectors
) -> Iterator[Layer]:
    for one, other in zip(behaviour, neutral, strict=True):
        yield Layer(Average(counts[0], one), Average(counts[1], other))


def _raw_vectors(layer: Layer, settings: DirectionSettings) -> StreamVectors:
    """Return what the recipe's method finds; of an ensemble, the weighted sum of unit vectors.

    Members may differ in sign by accident, so each is taken with the sign that it has along the
    first one. The sum is as long as the first member's vector, for whatever compares lengths.
    """
    first, *more = (
        (method.weight, _rescaled(layer.find(method.function, **method.options), layer))
        for method in weighted_methods(settings)
    )
    if settings.method != "ensemble":
        return first[1]
    lead = first[1][:1]  # (1, hidden)
    total: StreamVectors = first[0] * _normalised(lead)
    for weight, rows in more:
        unit = _normalised(rows[:1])
        total = total + weight * unit * (-1.0 if (unit * lead).sum() < 0 else 1.0)
    total *= lead.norm()
    return total


def _rescaled(rows: StreamVectors, layer: Layer) -> StreamVectors:
    """Bring rows from a method's own unit, which may be small, to the residual stream's.

    Only vectors that are small compared with the residuals, at a layer where the sets' means are
    the same too, then count as rounding.
    """
    means = layer.behaviour.mean, layer.neutral.mean
    least = VANISHING * max(float(mean.norm()) for mean in means)
    length, gap = float(rows[0].norm()), float((means[0] - means[1]).norm())
    return rows * (gap / length) if 0 < length <= least < gap else rows


def _normalised(vectors: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
    units: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(TINY)
    return units


def _spared_vectors(
    neutral: LayerVectors, mean: bool, components: list[StreamVectors]
) -> list[LayerVectors]:
    """Return orthonormal vectors, each for all layers, that directions are made orthogonal to."""
    spared = [_normalised(neutral)] if mean else []
    for vectors in torch.stack(components).unbind(dim=1) if components else ():
        rest = _projected_out(vectors, spared)
        is_new = rest.norm(dim=-1, keepdim=True) > VANISHING  # (layer, 1)
        spared.append(torch.where(is_new, _normalised(rest), 0.0))
    return spared


def _orthonormal(
    raw: LayerStack, scale: Float[Tensor, " layer"], spared: list[LayerVectors], warn: Warn
) -> LayerStack:
    """Turn raw vectors into directions: orthonormal in each layer, orthogonal to what is spared.

    Args:
        raw: What the method found.
        scale: Length of the sets' means, against which a vector may be rounding.
        spared: Orthonormal vectors; see `_spared_vectors`.
        warn: Receives a sentence for each layer without a direction.
    """
    lead = _sparing(raw[:, 0], spared, warn)
    norms = lead.norm(dim=-1)  # (layer)
    usable = norms > VANISHING * scale.clamp_min(torch.finfo(torch.float32).tiny)
    for layer in (~usable & (scale > 0)).nonzero().flatten().tolist():  # scale 0: an empty layer
        warn(f"layer {layer} has no direction: the two sets don't differ there")
    units = [torch.where(usable[:, None], lead / norms.clamp_min(TINY)[:, None], 0.0)]
    for row in raw[:, 1:].unbind(dim=1):
        rest = _projected_out(row, [*spared, *units])
        is_new = (rest.norm(dim=-1) > VANISHING * row.norm(dim=-1)) & usable
        units.append(torch.where(is_new[:, None], _normalised(rest), 0.0))
    return torch.stack(units, dim=1)


def _sparing(raw: LayerVectors, spared: list[LayerVectors], warn: Warn) -> LayerVectors:
    """Make `raw` orthogonal to what is spared, except at layers where nothing would remain."""
    if not spared:
        return raw
    rest = _projected_out(raw, spared)
    vanished = rest.norm(dim=-1) <= VANISHING * raw.norm(dim=-1)  # (layer)
    what = "is parallel to the neutral mean" if len(spared) == 1 else "lies in what is to be spared"
    for layer in (vanished & (raw.norm(dim=-1) > 0)).nonzero().flatten().tolist():
        warn(f"layer {layer}: the direction {what}; it is used as it is")
    return torch.where(vanished[:, None], raw, rest)


def _projected_out(raw: LayerVectors, units: list[LayerVectors]) -> LayerVectors:
    """Return `raw` without its components along orthonormal vectors."""
    rest = raw
    for _ in range(2):  # twice: the second pass removes the first one's rounding
        for unit in units:
            rest = rest - (rest * unit).sum(dim=-1, keepdim=True) * unit
    return rest
