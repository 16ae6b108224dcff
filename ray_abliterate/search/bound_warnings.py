"""Bounds of the search space that the frontier leans on, and the setting that widens each.

Pure values; knows nothing about reports or terminals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.space import RealRange, SearchSpace

NEAR = 0.02
"""Nearer to a bound than this share of the range counts as being at it."""
NOTEWORTHY = 0.2
"""Share of the members that has to be at a bound: one stray member says nothing."""


@dataclass(frozen=True)
class _Bound:
    """One end of one parameter's range."""

    parameter: str
    side: str
    value: float
    opposite: float

    def holds(self, plan: Plan) -> bool:
        """The plan lies at this bound."""
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
    """One sentence per bound that members of the frontier are at, the most frequent first.

    A wider range might give a better frontier there. Left out: bounds where nothing lies beyond
    (the first and the last layer, a floor of 0 or 1, a reach of one layer or of all), the lower
    bound of a peak that can be 0, and the members that a parameter has no effect on (another
    direction scope, a component that is switched off).
    """
    found: list[tuple[int, str]] = []
    for bound in _bounds(space):
        used = [member for member in frontier.members if _matters(bound, member.plan)]
        there = [member for member in used if bound.holds(member.plan)]
        if there and len(there) >= NOTEWORTHY * len(used):
            found.append((len(there), _sentence(bound, there, len(used), space)))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _bounds(space: SearchSpace) -> list[_Bound]:
    """The bounds worth widening."""
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
    """The plan would be another one if this parameter were."""
    if not bound.component:
        return plan.scope == ("per-layer" if bound.parameter == "source_offset" else "global")
    profile = dict(plan.profiles).get(bound.component)
    return profile is not None and profile.peak > 0


def _sentence(bound: _Bound, there: Sequence[Trial], used: int, space: SearchSpace) -> str:
    last = max(space.shape.layers - 1, 1)
    value = f"{bound.value:.3g}"
    if bound.field != "peak" and bound.field != "floor":
        count = bound.field in ("reach", "source_offset")
        value = f"{value} layers" if count else f"layer {value}"
        value += f" ({bound.value / last:.3g} in the recipe)"
    numbers = ", ".join(str(trial.number) for trial in there[:6])
    more = ", …" if len(there) > 6 else ""
    members = "member" if used == 1 else "members"
    return (
        f"{bound.parameter} is at its {bound.side} bound {value} in {len(there)} of {used} "
        f"frontier {members} that use it (trial {numbers}{more}): widen {bound.setting}"
    )
