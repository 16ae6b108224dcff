"""Finding directions: the recipe's method on every layer, made unit vectors that spare the neutral.

Whole sets, sums, and layers that come one at a time all end here.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.directions import VANISHING, Directions
from ray_abliterate.directions.methods.inputs import (
    NEEDS,
    TINY,
    Average,
    Layer,
    Need,
    Sample,
    StreamVectors,
    Summary,
    demand_of,
)
from ray_abliterate.directions.methods.principal_components import neutral_components
from ray_abliterate.directions.methods.registry import METHODS
from ray_abliterate.directions.residuals.moments import Moments
from ray_abliterate.directions.residuals.residual_set import LayerVectors, Residuals
from ray_abliterate.directions.residuals.shard import Sums
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.recipe.plugins import resolve

log = logging.getLogger(__name__)

Stack = Float[Tensor, "layer rank hidden"]
WeightedMethod = tuple[str, float, Callable[..., Any], Mapping[str, Any]]


def weighted_methods(settings: DirectionSettings) -> list[WeightedMethod]:
    """Name, weight, function and options of the recipe's methods: one, or those of an ensemble."""
    if settings.method != "ensemble":
        return [(settings.method, 1.0, find_method(settings.method), settings.options)]
    return [
        (member.method, member.weight, find_method(member.method), member.options)
        for member in settings.ensemble
    ]


def find_method(method: str) -> Callable[..., Any]:
    """A method of this package, or the one that `module:function` names.

    Raises:
        ScoreError: there is no such module, or nothing of that name in it.
        RecipeError: it is no function.
    """
    found: Any = METHODS[method] if method in METHODS else resolve(method)
    if not callable(found):
        raise RecipeError(f"direction.method: {method} is no function, but {found!r}")
    function: Callable[..., Any] = found
    return function


def need_of(settings: DirectionSettings) -> Need:
    """The most that the recipe's methods need to know of residuals."""
    needs = [demand_of(function).need for _, _, function, _ in weighted_methods(settings)]
    if settings.project_out_components:
        needs.append(demand_of(neutral_components).need)
    return max(needs, key=NEEDS.index)


def rows_per_layer(settings: DirectionSettings) -> int:
    """Vectors that every writer is multiplied with, for each layer: directions, and what is spared.

    A method of several directions is taken to say how many by an option or default called `rank`.
    """
    rank = 1
    if settings.method != "ensemble":
        ((_, _, function, options),) = weighted_methods(settings)
        known = inspect.signature(function).parameters
        rank = int(options.get("rank", known["rank"].default)) if "rank" in known else 1
    return rank + settings.biproject


def refuse_unknown_methods(settings: DirectionSettings) -> None:
    """Make sure, before a model is loaded, that methods exist and take the options they are given.

    Methods of this package are also tried, on a handful of numbers.

    Raises:
        ScoreError: a module or function is not there.
        RecipeError: a method has no option of that name, or can't do with its value.
    """
    for name, _, function, options in weighted_methods(settings):
        own = _options_of(function)
        for option, value in options.items():
            if own is not None and option not in own:
                has = f"it has {', '.join(own)}" if own else "it has none"
                raise RecipeError(f"direction.options: {name} has no option {option!r}; {has}")
            _refuse_other_type(f"{name}.{option}", value, (own or {}).get(option, Any))
        if name in METHODS:
            _try(name, function, options)


def _options_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Types of a method's options by name; None if it takes any."""
    after = list(inspect.signature(function).parameters.values())[2:]
    if any(one.kind is one.VAR_KEYWORD for one in after):
        return None
    unknown = [one.annotation is one.empty or isinstance(one.annotation, str) for one in after]
    return {
        one.name: Any if blank else one.annotation
        for one, blank in zip(after, unknown, strict=True)
    }


def _refuse_other_type(option: str, value: Any, wanted: Any) -> None:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise RecipeError(f"direction.options: {option} = {value!r}: {problem}") from None


def _try(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    numbers = torch.arange(24.0).reshape(2, 4, 3).sin()
    try:
        Layer(Sample(numbers[0], 3), Sample(numbers[1], 3)).find(function, **options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"direction.options: {name}: {error}") from None


def directions_from_residuals(
    behaviour: Residuals, neutral: Residuals, settings: DirectionSettings
) -> Directions:
    """The directions that the recipe asks for, from whole sets.

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
        return directions_from_layers(
            _averages(counts, behaviour.mean(), neutral.mean()), settings, origin
        )
    hidden = behaviour.values.shape[2]
    layers = (
        Layer(*(Sample(s.values[:, index].contiguous(), hidden) for s in (behaviour, neutral)))
        for index in range(behaviour.layers)
    )
    return directions_from_layers(layers, settings, origin)


def directions_from_sums(
    behaviour: Sums, neutral: Sums, settings: DirectionSettings, origin: Mapping[str, str]
) -> Directions:
    """What `directions_from_residuals` finds, for a method that needs means alone, from sums of winsorised residuals.

    The means differ from those of whole sets by float64 rounding, the directions by at most one
    rounding to float32.

    Raises:
        ValueError: the shapes differ, or no layer has a direction.
    """
    means = torch.from_numpy(behaviour.mean), torch.from_numpy(neutral.mean)
    return directions_from_layers(
        _averages((behaviour.prompts, neutral.prompts), *means), settings, origin
    )


def directions_from_moments(
    behaviour: Moments, neutral: Moments, settings: DirectionSettings, origin: Mapping[str, str]
) -> Directions:
    """The same, for a method that needs variances, from moments of winsorised residuals.

    Raises:
        ValueError: no layer has a direction.
    """
    layers = (
        Layer(Summary(behaviour.layer(index)), Summary(neutral.layer(index)))
        for index in range(len(behaviour.mean))
    )
    return directions_from_layers(layers, settings, origin)


def directions_from_layers(
    layers: Iterable[Layer], settings: DirectionSettings, origin: Mapping[str, str]
) -> Directions:
    """The directions that the recipe asks for, from layers of which one at a time is in memory.

    Raises:
        ValueError: no layer has a direction, or a method gave something else than vectors.
    """
    raw, means, components = (
        list[StreamVectors](),
        list[tuple[Tensor, Tensor]](),
        list[StreamVectors](),
    )
    for layer in layers:
        raw.append(_raw(layer, settings))
        means.append((layer.behaviour.mean, layer.neutral.mean))
        if count := settings.project_out_components:
            components.append(layer.find(_components, count=count))
    rank = max(len(rows) for rows in raw)
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows))) for rows in raw]
    behaviour, neutral = (torch.stack(side) for side in zip(*means, strict=True))
    spared = _spared(neutral, settings.project_out_neutral, components)
    lead, *others = _unit(torch.stack(padded), behaviour, neutral, spared).unbind(dim=1)
    return Directions(
        lead.float(),
        settings.method,
        origin,
        torch.stack(others, dim=1).float() if others else None,
        _normed(neutral).float() if settings.biproject else None,
    )


def _components(behaviour: Any, neutral: Any, count: int) -> StreamVectors:
    return neutral_components(behaviour, neutral, count=min(count, len(neutral.mean)))


_components.demand = demand_of(neutral_components)  # type: ignore[attr-defined]


def _averages(
    counts: tuple[int, int], behaviour: LayerVectors, neutral: LayerVectors
) -> Iterator[Layer]:
    for one, other in zip(behaviour, neutral, strict=True):
        yield Layer(Average(counts[0], one), Average(counts[1], other))


def _raw(layer: Layer, settings: DirectionSettings) -> StreamVectors:
    """What the recipe's method finds; of an ensemble the weighted sum of unit vectors.

    Members may differ in sign by accident, so each is taken with the sign that it has along the
    first one. The sum is as long as the first member's vector, for whatever compares lengths.
    """
    first, *more = (
        (weight, _sized(layer.find(function, **options), layer))
        for _, weight, function, options in weighted_methods(settings)
    )
    if settings.method != "ensemble":
        return first[1]
    lead = first[1][:1]
    total: StreamVectors = first[0] * _normed(lead)
    for weight, rows in more:
        unit = _normed(rows[:1])
        total = total + weight * unit * (-1.0 if (unit * lead).sum() < 0 else 1.0)
    total *= lead.norm()
    return total


def _sized(rows: StreamVectors, layer: Layer) -> StreamVectors:
    """Rows in a unit of the method's own, which may be small, brought to the stream's.

    So that only what is small beside the residuals, where the sets' means are the same too, counts
    as rounding.
    """
    means = layer.behaviour.mean, layer.neutral.mean
    least = VANISHING * max(float(mean.norm()) for mean in means)
    length, gap = float(rows[0].norm()), float((means[0] - means[1]).norm())
    return rows * (gap / length) if 0 < length <= least < gap else rows


def _normed(vectors: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
    units: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(TINY)
    return units


def _spared(
    neutral: LayerVectors, mean: bool, components: list[StreamVectors]
) -> list[LayerVectors]:
    """Orthonormal vectors, each for all layers, that directions are made orthogonal to."""
    found = [_normed(neutral)] if mean else []
    for vectors in torch.stack(components).unbind(dim=1) if components else ():
        rest = _without(vectors, found)
        left = rest.norm(dim=-1, keepdim=True) > VANISHING
        found.append(torch.where(left, _normed(rest), 0.0))
    return found


def _unit(
    raw: Stack, behaviour: LayerVectors, neutral: LayerVectors, spared: list[LayerVectors]
) -> Stack:
    """Raw vectors, and the means of the two sets, made directions: orthonormal in each layer."""
    lead = _sparing(raw[:, 0], spared)
    scale = torch.maximum(behaviour.norm(dim=-1), neutral.norm(dim=-1))
    norms = lead.norm(dim=-1)
    usable = norms > VANISHING * scale.clamp_min(torch.finfo(torch.float32).tiny)
    for layer in (~usable & (scale > 0)).nonzero().flatten().tolist():  # else nothing is there
        log.warning("layer %d has no direction: the two sets don't differ there", layer)
    units = [torch.where(usable[:, None], lead / norms.clamp_min(TINY)[:, None], 0.0)]
    for row in raw[:, 1:].unbind(dim=1):
        rest = _without(row, [*spared, *units])
        left = (rest.norm(dim=-1) > VANISHING * row.norm(dim=-1)) & usable
        units.append(torch.where(left[:, None], _normed(rest), 0.0))
    return torch.stack(units, dim=1)


def _sparing(raw: LayerVectors, spared: list[LayerVectors]) -> LayerVectors:
    """`raw` made orthogonal to what is spared; a layer where nothing else is left keeps it."""
    if not spared:
        return raw
    rest = _without(raw, spared)
    vanished = rest.norm(dim=-1) <= VANISHING * raw.norm(dim=-1)
    what = "is parallel to the neutral mean" if len(spared) == 1 else "lies in what is to be spared"
    for layer in (vanished & (raw.norm(dim=-1) > 0)).nonzero().flatten().tolist():
        log.warning("layer %d: the direction %s; it is kept whole", layer, what)
    return torch.where(vanished[:, None], raw, rest)


def _without(raw: LayerVectors, units: list[LayerVectors]) -> LayerVectors:
    """`raw` without its parts along orthonormal vectors."""
    rest = raw
    for _ in range(2):  # twice: the second pass takes out the first one's rounding
        for unit in units:
            rest = rest - (rest * unit).sum(dim=-1, keepdim=True) * unit
    return rest
