"""Recommends a method from a comparison, with reasons in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ray_abliterate.directions.comparison.stability import Stability, prompts_needed, reliability
from ray_abliterate.directions.separability import auroc_error

ENOUGH = 0.95
"""Cosine with the direction of infinitely many prompts at which prompts are enough."""
CLEARLY_MORE_RELIABLE = 0.05
"""A method is preferred for its reliability if that is larger by more than this."""
WEAK_AUROC = 0.75
"""Below this AUROC, no direction separates the sets well."""


@dataclass(frozen=True)
class MethodCandidate:
    """What a recommendation considers of one method.

    Attributes:
        layer: The method's own best layer.
        auroc: Its AUROC there, on held-out prompts.
        stability: At the layer where all methods are sampled.
    """

    layer: int
    auroc: float
    stability: tuple[Stability, ...]


@dataclass(frozen=True)
class Recommendation:
    """The recommended method, and sentences that say why."""

    method: str
    reasons: tuple[str, ...]


def recommend_method(
    candidates: Mapping[str, MethodCandidate], counts: tuple[int, int]
) -> Recommendation:
    """Return the simplest method that is not clearly worse than the best.

    "Clearly" means by more than one standard error of the best AUROC (Breiman et al. 1984). Among
    the others, a method is passed over only for one that is clearly more reliable.

    Args:
        candidates: The methods by name, simplest first.
        counts: Prompts of each set.

    Raises:
        ValueError: there is no method.
    """
    if not candidates:
        raise ValueError("no method has a direction")
    prompts = min(counts)
    reliabilities = {
        name: reliability(candidate.stability, prompts) for name, candidate in candidates.items()
    }
    best = max(candidates, key=lambda name: candidates[name].auroc)
    error = auroc_error(candidates[best].auroc, *counts)
    least = candidates[best].auroc - error
    near = [name for name, candidate in candidates.items() if candidate.auroc >= least]
    simplest = near[0]
    most_reliable = max(near, key=lambda name: _known(reliabilities[name]))
    least_reliability = _known(reliabilities[simplest]) + CLEARLY_MORE_RELIABLE
    clearly = _known(reliabilities[most_reliable]) > least_reliability
    chosen = most_reliable if clearly else simplest
    candidate = candidates[chosen]
    reasons = [
        f"On held-out prompts, {chosen} separates the sets with an AUROC of {candidate.auroc:.3f} "
        f"at layer {candidate.layer}; the best is {best} with {candidates[best].auroc:.3f} ± "
        f"{error:.3f} (standard error)."
        if chosen != best
        else f"On held-out prompts, {chosen} separates the sets best: AUROC {candidate.auroc:.3f} "
        f"± {error:.3f} (standard error) at layer {candidate.layer}."
    ]
    if clearly:
        reasons.append(
            f"It is more reliable than {simplest}, which is simpler: with all prompts its "
            f"direction has an estimated cosine of {reliabilities[chosen]:.2f} with that of "
            f"infinitely many prompts, {simplest}'s {reliabilities[simplest]:.2f}."
        )
    elif len(near) > 1:
        reasons.append(
            f"It is the simplest of the {len(near)} methods within a standard error of the best."
        )
    reasons.append(_about_prompts(chosen, candidate, reliabilities[chosen], prompts))
    reasons.append(_about_separation(candidate))
    return Recommendation(chosen, tuple(reasons))


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _about_prompts(method: str, candidate: MethodCandidate, cosine: float, prompts: int) -> str:
    """Say whether there are enough prompts, and if not, how many would be."""
    if math.isnan(cosine):
        return f"{prompts} prompts per set are too few to tell how reliable the direction is."
    estimate = (
        f"From {prompts} prompts per set, {method}'s direction has an estimated cosine of "
        f"{cosine:.2f} with that of infinitely many"
    )
    if cosine >= ENOUGH:
        return f"{estimate}: they are enough."
    wanted = prompts_needed(candidate.stability, ENOUGH)
    if wanted is None:
        return f"{estimate}: samples of the prompts do not agree on any direction."
    return f"{estimate}; about {_rounded_up(wanted)} per set would make it {ENOUGH}."


def _about_separation(candidate: MethodCandidate) -> str:
    if candidate.auroc >= WEAK_AUROC:
        return (
            "A direction that separates the sets need not cause the behaviour: compare searches "
            "with the first two methods."
        )
    return (
        f"An AUROC of {candidate.auroc:.2f} is weak: the sets hardly differ at the last token. "
        "Look at the prompts before you search."
    )


def _rounded_up(count: int) -> int:
    """Round an estimate up to two digits."""
    step = int("1".ljust(len(str(count)) - 1, "0"))
    return math.ceil(count / step) * step
