"""How well one number per prompt separates two sets, and how far apart sets of points lie.

Knows nothing about directions, layers or models. Both sets have equal weight, whatever their sizes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy
from jaxtyping import Float

BehaviourValues = Float[numpy.ndarray, " prompt"]
NeutralValues = Float[numpy.ndarray, " other"]
MOST_BINS = 20
"""Bins that mutual information is counted in, at most."""


def measure_separability(behaviour: BehaviourValues, neutral: NeutralValues) -> dict[str, float]:
    """Return every measure of this module by name."""
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
"""The measures of sets that nothing separates."""


def auroc(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Return the chance that a behaviour prompt lies above a neutral one; ties count half.

    0.5 is no separation. Computed from ranks (Mann and Whitney 1947), so that memory grows with the
    prompts, not their square.
    """
    ordered = numpy.sort(neutral)
    below = ordered.searchsorted(behaviour, "left") + ordered.searchsorted(behaviour, "right")
    return float(below.sum() / (2 * len(behaviour) * len(neutral)))


def auroc_error(area: float, behaviour: int, neutral: int) -> float:
    """Return the standard error of an AUROC: Hanley and McNeil 1982, Radiology 143.

    That of an area of 1 or 0 would be 0, so such an area is moved half a prompt away.

    Args:
        area: The AUROC.
        behaviour: Number of behaviour prompts.
        neutral: Number of neutral prompts.
    """
    edge = 0.5 / (behaviour * neutral) ** 0.5
    area = min(max(area, edge), 1 - edge)
    above, below = area / (2 - area), 2 * area * area / (1 + area)
    total = area * (1 - area) + (behaviour - 1) * (above - area * area)
    total += (neutral - 1) * (below - area * area)
    return math.sqrt(max(total, 0.0) / (behaviour * neutral))


def fisher(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Return the squared distance of the means over the sum of variances; 0 if nothing varies."""
    spread = float(behaviour.var() + neutral.var())
    gap = float(behaviour.mean() - neutral.mean())
    return gap * gap / spread if spread > 0 else 0.0


def overlap(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Return the area that the two distributions share: 0 is none, 1 all.

    It is 1 less the distance of Kolmogorov and Smirnov, which needs no bins. That is exact where
    the densities cross once; where they cross more often, the shared area is smaller.
    """
    points = numpy.sort(numpy.concatenate([behaviour, neutral]))
    shares = [numpy.sort(s).searchsorted(points, "right") / len(s) for s in (behaviour, neutral)]
    return float(1 - numpy.abs(shares[0] - shares[1]).max())


def mutual_information(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Return how many bits the number gives about which set a prompt is from: 0 to 1.

    Counted in bins that hold equally many prompts, with each entropy corrected for the bias of
    counting (Miller and Madow 1955).
    """
    a, b = len(behaviour), len(neutral)
    bins = max(2, min(MOST_BINS, int(math.sqrt((a + b) / 5))))
    inner = numpy.arange(1, bins) / bins
    edges = numpy.unique(numpy.quantile(numpy.concatenate([behaviour, neutral]), inner))
    one, other = (
        numpy.bincount(edges.searchsorted(s, "right"), minlength=len(edges) + 1) / len(s)
        for s in (behaviour, neutral)
    )
    given_set = 0.5 * (_entropy(one, 1 / a) + _entropy(other, 1 / b))
    # the variance of a mean of the two shares is a quarter of the sum
    information = _entropy(0.5 * (one + other), 0.25 / a + 0.25 / b) - given_set
    return min(1.0, max(0.0, information))


def _entropy(shares: Float[numpy.ndarray, " bin"], variance: float) -> float:
    """Return the entropy of counted shares in bits, corrected for the bias of counting."""
    occupied = shares[shares > 0]
    bias = (len(occupied) - 1) * variance / 2
    return float(bias - (occupied * numpy.log(occupied)).sum()) / math.log(2)


def silhouette(behaviour: BehaviourValues, neutral: NeutralValues) -> float:
    """Return how much nearer numbers lie to their own set than to the other one: -1 to 1.

    Rousseeuw 1987, Journal of Computational and Applied Mathematics 20; averaged over each set, and
    then over both. Computed from sorted sums, so that memory grows with the prompts, not their
    square.
    """
    sets = behaviour.astype(numpy.float64), neutral.astype(numpy.float64)
    outside = [_distance_sums(own, other) for own, other in (sets, sets[::-1])]
    inside = [_distance_sums(own, own) for own in sets]
    return _mean_silhouette(inside, outside)


def silhouette_of(distances: Float[numpy.ndarray, "point point"], first: int) -> float:
    """Return the silhouette of points of any dimension, from all their distances.

    Args:
        distances: Distances between all points; the behaviour's come first.
        first: The number of the behaviour's points.
    """
    own, cross, other = (
        distances[:first, :first],
        distances[:first, first:],
        distances[first:, first:],
    )
    return _mean_silhouette(
        [own.sum(axis=1), other.sum(axis=1)],
        [cross.sum(axis=1), cross.sum(axis=0)],
    )


def _mean_silhouette(inside: list[Any], outside: list[Any]) -> float:
    """Average the silhouette over each set, then over both.

    Args:
        inside: By set, each point's summed distances to its own set.
        outside: By set, each point's summed distances to the other set.
    """
    scores = []
    for index in (0, 1):
        count, others = len(inside[index]), len(outside[1 - index])
        near = inside[index] / max(1, count - 1)  # a point is no neighbour of its own
        far = outside[index] / others
        larger = numpy.maximum(near, far)
        score = (far - near) / numpy.where(larger > 0, larger, 1.0)
        scores.append(float(score.mean()) if count > 1 else 0.0)
    return sum(scores) / 2


def _distance_sums(points: BehaviourValues, others: NeutralValues) -> BehaviourValues:
    """Return the sum of each point's distances to the others."""
    ordered = numpy.sort(others)
    sums = numpy.concatenate([[0.0], ordered.cumsum()])
    below = ordered.searchsorted(points)  # how many of the others lie below each point
    total: BehaviourValues = points * (2 * below - len(ordered)) - 2 * sums[below] + sums[-1]
    return total
