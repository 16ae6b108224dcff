"""The recipe's `[search.space]`: which edits are tried; see `recipe/recipe.py`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.model import COMPONENT_NAMES
from ray_abliterate.recipe.parsing import suggestion
from ray_abliterate.recipe.section import Section

Interval = tuple[float, float]
FEED_FORWARD = ("mlp", "experts", "shared_experts")
INTERVALS = ("direction_layer", "peak", "peak_layer", "floor", "reach")


class ComponentSpace(Section):
    """Ranges of one component that differ from those of `search.space`."""

    peak: Interval | None = None
    peak_layer: Interval | None = None
    floor: Interval | None = None
    reach: Interval | None = None


class SpaceSettings(Section):
    """The search space. Layers are given as fractions of the last layer's index."""

    scope: tuple[Literal["global", "per-layer"], ...] = ("global", "per-layer")
    """`global`: one direction for all layers; `per-layer`: each layer's own."""
    direction_layer: Interval = (0.4, 0.9)
    """Layer from which the global direction is taken."""
    source_offset: Interval | None = None
    """With `per-layer`: how far above its own layer (below, if negative) each layer's direction is
    taken from, such as `[-0.1, 0.1]`; from its own layer if unset."""
    peak: Interval = (0.8, 1.5)
    """Largest strength; below 0, the component is switched off."""
    peak_layer: Interval = (0.6, 1.0)
    """Layer with the largest strength."""
    floor: Interval = (0.0, 1.0)
    """Strength at the end of the reach, as a fraction of the peak."""
    reach: Interval = (0.0, 0.6)
    """Layers on each side of the peak that are edited; at least one layer."""
    components: dict[str, ComponentSpace] = Field(default_factory=dict, validate_default=True)
    """Ranges by component. Feed-forward components have peak = [-0.25, 1.5] by default, so that
    they can be switched off."""

    @field_validator("components")
    @classmethod
    def _feed_forward_can_be_off(
        cls, given: dict[str, ComponentSpace]
    ) -> dict[str, ComponentSpace]:
        default = ComponentSpace(peak=(-0.25, 1.5))
        explicit = {name: _explicit(given[name]) if name in given else {} for name in FEED_FORWARD}
        updated = {name: default.model_copy(update=explicit[name]) for name in FEED_FORWARD}
        return {**given, **updated}

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "SpaceSettings":
        ranges = {n: getattr(self, n) for n in INTERVALS}
        for component, space in self.components.items():
            if component not in COMPONENT_NAMES:
                near = suggestion(component, COMPONENT_NAMES)
                known = ", ".join(COMPONENT_NAMES)
                raise ValueError(f"components.{component} is not a component.{near} Known: {known}")
            ranges |= {f"components.{component}.{n}": getattr(space, n) for n in INTERVALS[1:]}
        for name, bounds in ranges.items():
            if bounds is None:
                continue
            low, high = bounds
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] must run from low to high")
            field = name.rsplit(".", 1)[-1]
            if field != "peak" and low < 0:
                raise ValueError(f"{name} = [{low}, {high}] must not be negative")
            if field in ("direction_layer", "peak_layer", "floor") and high > 1:
                raise ValueError(f"{name} = [{low}, {high}] is a fraction, which ends at 1")
        if not self.scope:
            raise ValueError("scope must hold `global`, `per-layer` or both")
        return self

    @model_validator(mode="after")
    def _offset_has_a_use(self) -> "SpaceSettings":
        low, high = self.source_offset or (0.0, 0.0)
        if not -1 <= low <= high <= 1:
            raise ValueError(
                f"source_offset = [{low}, {high}] must run from low to high, inside [-1, 1]"
            )
        if self.source_offset is not None and "per-layer" not in self.scope:
            raise ValueError(
                "source_offset is for `per-layer`, which scope leaves out; drop source_offset, or "
                "add `per-layer` to scope"
            )
        return self


def _explicit(space: "ComponentSpace") -> dict[str, Any]:
    """Return the ranges that the recipe sets."""
    return {name: getattr(space, name) for name in space.model_fields_set}
