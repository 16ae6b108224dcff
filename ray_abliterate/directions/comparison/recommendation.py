"""What to take from a comparison of methods, in words and with the reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ray_abliterate.directions.comparison.stability import Stability, prompts_needed, reliability
from ray_abliterate.directions.separability import auroc_error

ENOUGH = 0.95
"""A direction with this cosine with the one of infinitely many prompts is taken as found."""
STEADIER = 0.05
"""A method is preferred for its reliability if that is larger by more than this."""
FAINT = 0.75
"""Below this AUROC nothing was found that tells the sets apart well."""


@dataclass(frozen=True)
class MethodCandidate:
    """What counts of one method, at its own best layer.

    Attributes:
        layer: That layer.
        auroc: There, on prompts that it was not found from.
        stability: At the layer that all methods are sampled at.
    """

    layer: int
    auroc: float
    stability: tuple[Stability, ...]


@dataclass(frozen=True)
class Recommendation:
    """A method, and sentences that say why."""

    method: str
    reasons: tuple[str, ...]


def recommend_method(
    standings: Mapping[str, MethodCandidate], counts: tuple[int, int]
) -> Recommendation:
    """The simplest method that is not clearly worse than the best.

    One standard error of the best AUROC is what "clearly" means (Breiman et al. 1984); among those,
    a method is passed over only for one that is clearly steadier.

    Args:
        standings: By method, simplest first.
        counts: Prompts of each set.

    Raises:
        ValueError: there is no method.
    """
    if not standings:
        raise ValueError("no method found a direction")
    prompts = min(counts)
    steady = {name: reliability(s.stability, prompts) for name, s in standings.items()}
    best = max(standings, key=lambda name: standings[name].auroc)
    error = auroc_error(standings[best].auroc, *counts)
    near = [name for name in standings if standings[name].auroc >= standings[best].auroc - error]
    first, steadiest = near[0], max(near, key=lambda name: _known(steady[name]))
    clearly = _known(steady[steadiest]) > _known(steady[first]) + STEADIER
    chosen = steadiest if clearly else first
    own = standings[chosen]
    reasons = [
        f"On prompts that it was not found from, {chosen} tells the sets apart with an AUROC of "
        f"{own.auroc:.3f} at layer {own.layer}; the best is {best} with "
        f"{standings[best].auroc:.3f} ± {error:.3f} (standard error)."
        if chosen != best
        else f"On prompts that it was not found from, {chosen} tells the sets apart best: AUROC "
        f"{own.auroc:.3f} ± {error:.3f} (standard error) at layer {own.layer}."
    ]
    if clearly:
        reasons.append(
            f"It is steadier than {first}, which is simpler: with all prompts its direction has an "
            f"estimated cosine of {steady[chosen]:.2f} with that of infinitely many prompts, "
            f"{first}'s {steady[first]:.2f}."
        )
    elif len(near) > 1:
        reasons.append(
            f"Of the {len(near)} methods within a standard error of the best it is the simplest."
        )
    reasons += [_about_prompts(chosen, own, steady[chosen], prompts), *_about_strength(own)]
    return Recommendation(chosen, tuple(reasons))


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _about_prompts(method: str, own: MethodCandidate, steady: float, prompts: int) -> str:
    """Whether there are enough."""
    if math.isnan(steady):
        return f"{prompts} prompts a set are too few to say how steady the direction is."
    said = (
        f"From {prompts} prompts a set, {method}'s direction has an estimated cosine of "
        f"{steady:.2f} with that of infinitely many"
    )
    if steady >= ENOUGH:
        return f"{said}: they are enough."
    wanted = prompts_needed(own.stability, ENOUGH)
    if wanted is None:
        return f"{said}: samples of the prompts do not agree on any direction."
    return f"{said}; about {_rounded(wanted)} a set would make it {ENOUGH}."


def _about_strength(own: MethodCandidate) -> list[str]:
    if own.auroc >= FAINT:
        return ["Telling apart is not carrying: compare what a search makes of the first two."]
    return [
        f"An AUROC of {own.auroc:.2f} is weak: the sets hardly differ at the last token. Look at "
        "the prompts before you search."
    ]


def _rounded(count: int) -> int:
    """Two digits of it: it is an estimate."""
    step = int("1".ljust(len(str(count)) - 1, "0"))
    return math.ceil(count / step) * step
