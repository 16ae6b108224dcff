"""How well one number a prompt tells two sets apart, and how far apart sets of points lie.

Knows nothing about directions, layers or models. Both sets count the same, whatever their sizes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy
from jaxtyping import Float

BehaviourValues = Float[numpy.ndarray, " prompt"]
NeutralValues = Float[numpy.ndarray, " other"]
MOST_BINS = 20


def measure_separability(behaviour: BehaviourValues, neutral: NeutralValues) -> dict[str, float]:
    """All of them, by name."""
    return {
        "auroc": auroc(behaviour, neutral),
        "fisher": fisher(behaviour, neutral),
        "silhouette": silhouette(behaviour, neutral),
        "mutual_information": mutual_information(behaviour, neutral),
        "overlap": overlap(behaviour, neutral),
    }


CHANCE_LEVEL: Mapping[str, float] = {
    "auroc": 0.5, "fisher": 0.0, "silhouette": 0.0, "mutual_information": 0.0, "overlap": 1.0,
}  # fmt: skip
"""What sets measure that nothing tells apart."""


def auroc(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Chance that a behaviour prompt lies above a neutral one (0.5: not at all); ties count half.

    From ranks (Mann and Whitney 1947), so that memory grows with the prompts, not their square.
    """
    ordered = numpy.sort(neutral)
    below = ordered.searchsorted(behaviour, "left") + ordered.searchsorted(behaviour, "right")
    return float(below.sum() / (2 * len(behaviour) * len(neutral)))


def auroc_error(area: float, behaviour: int, neutral: int) -> float:
    """Standard error of an AUROC of so many prompts: Hanley and McNeil 1982, Radiology 143.

    That of an area of 1 or 0 would be 0; it is taken half a prompt away from there.
    """
    edge = 0.5 / (behaviour * neutral) ** 0.5
    area = min(max(area, edge), 1 - edge)
    above, below = area / (2 - area), 2 * area * area / (1 + area)
    total = area * (1 - area) + (behaviour - 1) * (above - area * area)
    total += (neutral - 1) * (below - area * area)
    return math.sqrt(max(total, 0.0) / (behaviour * neutral))


def fisher(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Squared distance of the means over the sum of variances; 0 where nothing varies."""
    spread = float(behaviour.var() + neutral.var())
    gap = float(behaviour.mean() - neutral.mean())
    return gap * gap / spread if spread > 0 else 0.0


def overlap(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Area that the two distributions share (0: none, 1: all), as 1 less their largest difference.

    Kolmogorov and Smirnov's distance needs no bins. It is the shared area where the densities cross
    once; where they cross more often, the shared area is smaller.
    """
    points = numpy.sort(numpy.concatenate([behaviour, neutral]))
    shares = [numpy.sort(s).searchsorted(points, "right") / len(s) for s in (behaviour, neutral)]
    return float(1 - numpy.abs(shares[0] - shares[1]).max())


def mutual_information(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Bits that the number tells about which set a prompt is from: 0 to 1.

    Counted in bins that hold equally many prompts, with the bias of counting taken out of each
    entropy (Miller and Madow 1955).
    """
    a, b = len(behaviour), len(neutral)
    bins = max(2, min(MOST_BINS, int(math.sqrt((a + b) / 5))))
    inner = numpy.arange(1, bins) / bins
    edges = numpy.unique(numpy.quantile(numpy.concatenate([behaviour, neutral]), inner))
    one, other = (
        numpy.bincount(edges.searchsorted(s, "right"), minlength=len(edges) + 1) / len(s)
        for s in (behaviour, neutral)
    )
    apart = 0.5 * (_entropy(one, 1 / a) + _entropy(other, 1 / b))
    found = _entropy(0.5 * (one + other), 0.25 / a + 0.25 / b) - apart
    return min(1.0, max(0.0, found))


def _entropy(shares: Float[numpy.ndarray, " bin"], variance: float) -> float:
    """In bits, of shares that were counted."""
    there = shares[shares > 0]
    bias = (len(there) - 1) * variance / 2
    return float(bias - (there * numpy.log(there)).sum()) / math.log(2)


def silhouette(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """How much nearer numbers lie to their own set than to the other one: -1 to 1.

    Rousseeuw 1987, Journal of Computational and Applied Mathematics 20; averaged over each set, and
    then over both. From sorted sums, so that memory grows with the prompts, not their square.
    """
    sets = behaviour.astype(numpy.float64), neutral.astype(numpy.float64)
    far = [_far(own, other) for own, other in (sets, sets[::-1])]
    near = [_far(own, own) for own in sets]
    return _silhouette(near, far)


def silhouette_of(distances: Float[numpy.ndarray, "point point"], first: int) -> float:
    """The same of points of any dimension, from all their distances.

    Args:
        distances: Between all points; those of the behaviour come first.
        first: How many these are.
    """
    own, cross, other = (
        distances[:first, :first],
        distances[:first, first:],
        distances[first:, first:],
    )
    return _silhouette(
        [own.sum(axis=1), other.sum(axis=1)],
        [cross.sum(axis=1), cross.sum(axis=0)],
    )


def _silhouette(near: list[Any], far: list[Any]) -> float:
    """From each point's distances to its own set and the other one, summed over them."""
    scores = []
    for index in (0, 1):
        count, others = len(near[index]), len(far[1 - index])
        inside, outside = near[index] / max(1, count - 1), far[index] / others
        larger = numpy.maximum(inside, outside)
        score = (outside - inside) / numpy.where(larger > 0, larger, 1.0)
        scores.append(float(score.mean()) if count > 1 else 0.0)
    return sum(scores) / 2


def _far(points: BehaviourValues, others: NeutralValues) -> BehaviourValues:
    """Sum of each point's distances to the others."""
    ordered = numpy.sort(others)
    sums = numpy.concatenate([[0.0], ordered.cumsum()])
    below = ordered.searchsorted(points)
    total: BehaviourValues = points * (2 * below - len(ordered)) - 2 * sums[below] + sums[-1]
    return total
