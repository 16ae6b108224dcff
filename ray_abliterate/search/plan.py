"""Plans: what to edit and how strongly, as small frozen values without tensors.

A plan is the unit that travels: parameters of a search become a plan, a plan with directions
becomes edits, and resume, export and reports read plans back. Knows nothing about models.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray_abliterate.recipe import Norm

Scope = Literal["global", "per-layer"]
ParameterValue = float | str
PROFILE_FIELDS = ("peak", "peak_layer", "floor", "reach")


@dataclass(frozen=True)
class ModelShape:
    """What a search must know of a model.

    Attributes:
        layers: Number of blocks.
        hidden: Width of the residual stream.
        components: The components that have writers.
    """

    layers: int
    hidden: int
    components: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """Strength over layers for one component: a tent.

    The strength is `peak` at `peak_layer`, falls linearly to `floor * peak` at a distance of
    `reach` layers, and is 0 beyond. A peak of 0 or below switches the component off.

    Raises:
        ValueError: `floor` is not in [0, 1], or `reach` is not above 0.
    """

    peak: float
    peak_layer: float
    floor: float
    reach: float

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor = {self.floor} must lie in [0, 1]")
        if self.reach <= 0:
            raise ValueError(f"reach = {self.reach} must be above 0 layers")

    def strengths(self, layers: int) -> tuple[float, ...]:
        """Return the strength of each of so many layers, 0 or above."""
        return tuple(self._at(layer) for layer in range(layers))

    def _at(self, layer: int) -> float:
        distance = abs(layer - self.peak_layer)
        if distance > self.reach or self.peak <= 0:
            return 0.0
        return self.peak * (1 + (distance / self.reach) * (self.floor - 1))


@dataclass(frozen=True)
class Plan:
    """One way to remove the behaviour: a direction scope and a profile per component.

    Attributes:
        scope: `global`: one direction, taken at `direction_layer`, for all layers; `per-layer`:
            each layer's own.
        direction_layer: A block index, may lie between two (then directions are interpolated).
        norm: What every edited matrix keeps; see `ablation/edit.py`.
        profiles: Component and profile, in order of component.
        source_offset: With `per-layer`, how many layers above its own (below, if negative) a
            layer's direction is taken from; its own if None. Ends of the model stand in for what
            lies beyond.
    """

    scope: Scope
    direction_layer: float
    norm: Norm
    profiles: tuple[tuple[str, Profile], ...]
    source_offset: float | None = None

    @classmethod
    def nothing(cls) -> "Plan":
        """Return the plan that edits no weight: the base model."""
        return cls("per-layer", 0.0, "none", ())

    @classmethod
    def uniform(cls, shape: ModelShape, layer: float, norm: Norm, strength: float = 1.0) -> "Plan":
        """Return the plan that takes one direction out of every writer with the same strength."""
        profile = Profile(strength, 0.5 * (shape.layers - 1), 1.0, float(shape.layers))
        return cls("global", layer, norm, tuple((c, profile) for c in sorted(shape.components)))

    @classmethod
    def from_params(cls, params: Mapping[str, Any], norm: Norm) -> "Plan":
        """Build the plan that a search's flat parameters describe.

        Raises:
            ValueError: a parameter is missing.
        """
        components = sorted({name.rpartition(".")[0] for name in params if "." in name})
        try:
            profiles = tuple(
                (c, Profile(**{f: float(params[f"{c}.{f}"]) for f in PROFILE_FIELDS}))
                for c in components
            )
            offset = params.get("source_offset")
            return cls(
                params["direction_scope"],
                float(params["direction_layer"]),
                norm,
                profiles,
                None if offset is None else float(offset),
            )
        except KeyError as error:
            raise ValueError(f"parameter {error} is missing; got {sorted(params)}") from None

    def to_params(self) -> dict[str, ParameterValue]:
        """Return the flat parameters from which `from_params` builds this plan."""
        flat: dict[str, ParameterValue] = {
            "direction_scope": self.scope,
            "direction_layer": self.direction_layer,
        }
        if self.source_offset is not None:
            flat["source_offset"] = self.source_offset
        for component, profile in self.profiles:
            flat |= {f"{component}.{field}": getattr(profile, field) for field in PROFILE_FIELDS}
        return flat

    def to_json(self) -> str:
        """Return the plan as one line of JSON, below 1 kB."""
        return json.dumps({"norm": self.norm, **self.to_params()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Parse a plan from `to_json`'s output."""
        values = json.loads(text)
        return cls.from_params(values, values.pop("norm"))

    def strengths(self, component: str, layers: int) -> tuple[float, ...]:
        """Return one component's strength in each layer; zeros if the plan leaves it alone."""
        profile = dict(self.profiles).get(component)
        return profile.strengths(layers) if profile else (0.0,) * layers

    @property
    def edits_nothing(self) -> bool:
        """Whether no component has any strength."""
        return all(profile.peak <= 0 for _, profile in self.profiles)
