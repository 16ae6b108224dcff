"""The search space of one model: flat parameters, each a real range or a few named values.

Knows nothing about the sampler or about models beyond their shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_abliterate.recipe import INTERVALS, ComponentSpace, Norm, SpaceSettings
from ray_abliterate.search.plan import ModelShape, ParameterValue, Plan


@dataclass(frozen=True)
class RealRange:
    """A real parameter between two bounds."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The value half way between the bounds."""
        return 0.5 * (self.low + self.high)

    def clamp(self, value: float) -> float:
        """Return the value inside the range that is nearest to `value`."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class CategoricalRange:
    """A parameter with a few named values."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The search space for one model: flat parameter names, each with its range.

    Layer fractions of the recipe are in units of the last layer's index here. The ranges are
    fixed for the whole study, so that the sampler can model parameters jointly.
    """

    shape: ModelShape
    norm: Norm
    parameters: tuple[tuple[str, RealRange | CategoricalRange], ...]

    @classmethod
    def of(cls, shape: ModelShape, settings: SpaceSettings, norm: Norm) -> "SearchSpace":
        """Build the space that a recipe describes, for a model of this shape."""
        last = max(shape.layers - 1, 0)
        parameters: list[tuple[str, RealRange | CategoricalRange]] = [
            ("direction_scope", CategoricalRange(settings.scope)),
            ("direction_layer", _scaled(settings.direction_layer, last)),
        ]
        if settings.source_offset is not None:
            parameters.append(("source_offset", _scaled(settings.source_offset, last)))
        for component in sorted(shape.components):
            overrides = settings.components.get(component, ComponentSpace())
            ranges = {f: getattr(overrides, f) or getattr(settings, f) for f in INTERVALS[1:]}
            parameters += [
                (f"{component}.peak", RealRange(*ranges["peak"])),
                (f"{component}.peak_layer", _scaled(ranges["peak_layer"], last)),
                (f"{component}.floor", RealRange(*ranges["floor"])),
                (f"{component}.reach", _reach(ranges["reach"], last)),
            ]
        return cls(shape, norm, tuple(parameters))

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """Return the plan that a point of the space stands for."""
        return Plan.from_params(params, self.norm)

    def initial_points(self, best_layer: float) -> tuple[dict[str, ParameterValue], ...]:
        """Return the points to try first: one direction at full strength, and the middle.

        The first takes the direction of `best_layer` out of every layer; the second is the middle
        of every range.

        Both lie in the space; the first is as near to uniform strength 1 as the space allows, and
        takes one direction for all layers if the scope allows it.
        """
        targets = {"peak": 1.0, "floor": 1.0, "reach": float(self.shape.layers)}
        targets["source_offset"] = 0.0
        uniform: dict[str, ParameterValue] = {}
        middle: dict[str, ParameterValue] = {}
        for name, domain in self.parameters:
            if isinstance(domain, CategoricalRange):
                uniform[name] = middle[name] = domain.options[0]
                if "global" in domain.options:
                    uniform[name] = "global"
                continue
            default = best_layer if name == "direction_layer" else domain.middle
            uniform[name] = domain.clamp(targets.get(name.rpartition(".")[2], default))
            middle[name] = domain.middle
        return uniform, middle


def _scaled(bounds: tuple[float, float], last: int) -> RealRange:
    return RealRange(bounds[0] * last, bounds[1] * last)


def _reach(bounds: tuple[float, float], last: int) -> RealRange:
    """Scale a reach to layers; at least one, so that a tent has sides in a model of one block."""
    low = max(bounds[0] * last, 1.0)
    return RealRange(low, max(bounds[1] * last, low))
