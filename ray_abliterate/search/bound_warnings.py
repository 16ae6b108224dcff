"""Warnings of bounds that hold the frontier back, and the setting that widens each.

Pure values; knows nothing about reports or terminals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.space import RealRange, SearchSpace

NEAR = 0.02
"""Share of the range; what is nearer to a bound counts as being at it."""
NOTEWORTHY = 0.2
"""Share of the members that must be at a bound: one stray member says nothing."""


@dataclass(frozen=True)
class _Bound:
    """One end of one parameter's range."""

    parameter: str
    side: str
    value: float
    opposite: float

    def holds(self, plan: Plan) -> bool:
        """Return whether a plan lies at this bound."""
        value = float(plan.to_params()[self.parameter])
        return abs(value - self.value) <= NEAR * abs(self.opposite - self.value)

    @property
    def component(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def field(self) -> str:
        return self.parameter.rpartition(".")[2]

    @property
    def setting(self) -> str:
        middle = f"components.{self.component}." if self.component else ""
        return f"search.space.{middle}{self.field}"


def bound_warnings(frontier: Frontier, space: SearchSpace) -> list[str]:
    """Return a sentence for each bound that members of the frontier are at, most frequent first.

    A wider range might give a better frontier there. Left out: bounds where nothing lies beyond
    (the first and the last layer, a floor of 0 or 1, a reach of one layer or of all), the lower
    bound of a peak that can be 0, and the members that a parameter has no effect on (another
    direction scope, a component that is switched off).
    """
    warnings: list[tuple[int, str]] = []
    for bound in _bounds(space):
        affected = [member for member in frontier.members if _matters(bound, member.plan)]
        at_bound = [member for member in affected if bound.holds(member.plan)]
        if at_bound and len(at_bound) >= NOTEWORTHY * len(affected):
            sentence = _sentence(bound, at_bound, len(affected), space)
            warnings.append((len(at_bound), sentence))
    return [sentence for _, sentence in sorted(warnings, key=lambda pair: -pair[0])]


def _bounds(space: SearchSpace) -> list[_Bound]:
    """Return the bounds beyond which there is something to try."""
    last = float(max(space.shape.layers - 1, 0))
    limits = {
        "direction_layer": (0.0, last),
        "source_offset": (-last, last),
        "peak": (0.0, float("inf")),
        "peak_layer": (0.0, last),
        "floor": (0.0, 1.0),
        "reach": (1.0, max(last, 1.0)),
    }
    bounds = []
    for name, domain in space.parameters:
        if not isinstance(domain, RealRange) or domain.low == domain.high:
            continue
        least, most = limits[name.rpartition(".")[2]]
        if domain.low > least:
            bounds.append(_Bound(name, "lower", domain.low, domain.high))
        if domain.high < most:
            bounds.append(_Bound(name, "upper", domain.high, domain.low))
    return bounds


def _matters(bound: _Bound, plan: Plan) -> bool:
    """Return whether the bound's parameter has an effect in a plan."""
    if not bound.component:
        return plan.scope == ("per-layer" if bound.parameter == "source_offset" else "global")
    profile = dict(plan.profiles).get(bound.component)
    return profile is not None and profile.peak > 0


def _sentence(bound: _Bound, at_bound: Sequence[Trial], affected: int, space: SearchSpace) -> str:
    last = max(space.shape.layers - 1, 1)
    value = f"{bound.value:.3g}"
    if bound.field not in ("peak", "floor"):
        is_distance = bound.field in ("reach", "source_offset")
        value = f"{value} layers" if is_distance else f"layer {value}"
        value += f" ({bound.value / last:.3g} in the recipe)"
    numbers = ", ".join(str(trial.number) for trial in at_bound[:6])
    ellipsis = ", …" if len(at_bound) > 6 else ""
    members = "member" if affected == 1 else "members"
    return (
        f"{bound.parameter} is at its {bound.side} bound {value} in {len(at_bound)} of {affected} "
        f"frontier {members} that use it (trial {numbers}{ellipsis}): widen {bound.setting}"
    )
