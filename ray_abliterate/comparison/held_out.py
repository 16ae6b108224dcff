"""How well a method's direction tells apart prompts that it was not found from.

A direction separates the prompts that it was found from better than any others, the more so the
fewer they are beside the units; with more units than prompts nearly any two sets can be told apart.
So each half of the prompts is measured along the direction of the other half.
"""

from dataclasses import dataclass

import numpy

from ray_abliterate.comparison.fits import Choice, Found, Sets
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.separation import Numbers, Others, measures


@dataclass(frozen=True)
class HeldOut:
    """Coordinates of all prompts along directions that they had no part in.

    Attributes:
        behaviour: In units of the residual stream, in the order of the set.
        neutral: The same. Each half is moved so that the middle of its two means is 0, since the
            two halves' directions have their own zero.
        agreement: Cosine of the two halves' directions.
    """

    behaviour: Numbers
    neutral: Others
    agreement: float

    def measures(self) -> dict[str, float]:
        """See `separation`; and the agreement."""
        return {**measures(self.behaviour, self.neutral), "agreement": self.agreement}


def held_out(sets: Sets, settings: DirectionSettings, seed: int = 0) -> HeldOut | Found:
    """Both halves along each other's direction; what went wrong if one has none.

    Args:
        sets: The residuals.
        settings: The method.
        seed: Decides the halves.
    """
    if min(sets.counts) < 2:
        return Found(problem="a set of one prompt has no halves")
    halves = split(sets.counts, seed)
    vectors = []
    for half in halves:
        found = sets.fit(settings, half)
        if found.vector is None:
            return found
        vectors.append(found.vector)
    axes, _ = sets.axes(settings)
    along = [numpy.empty(count) for count in sets.counts]
    for half, vector in zip(halves, reversed(vectors), strict=True):
        parts = [
            (values[chosen] @ vector).numpy()
            for values, chosen in zip((axes.behaviour, axes.neutral), half, strict=True)
        ]
        middle = 0.5 * (parts[0].mean() + parts[1].mean())
        for whole, chosen, part in zip(along, half, parts, strict=True):
            whole[chosen] = part - middle
    return HeldOut(along[0], along[1], float(vectors[0] @ vectors[1]))


def split(counts: tuple[int, int], seed: int) -> tuple[Choice, Choice]:
    """Two halves of both sets, at random; prompt i stays with prompt i where sets are equal."""
    orders = shuffled(counts, numpy.random.default_rng(seed))
    cuts = [(order[: len(order) // 2], order[len(order) // 2 :]) for order in orders]
    return Choice(cuts[0][0], cuts[1][0]), Choice(cuts[0][1], cuts[1][1])


def shuffled(counts: tuple[int, int], random: numpy.random.Generator) -> Choice:
    """All prompts of both sets in a random order, the same one where sets are of equal size."""
    one = random.permutation(counts[0])
    return Choice(one, one if counts[0] == counts[1] else random.permutation(counts[1]))
