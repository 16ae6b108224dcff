"""How well a method's direction tells apart prompts that it was not found from.

A direction separates the prompts that it was found from better than any others, the more so the
fewer they are beside the units; with more units than prompts nearly any two sets can be told apart.
So prompts are dealt to folds, and each fold is measured along the direction of all others: here two
halves, whose directions share no prompt, so that their cosine says how steady the method is.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.directions.comparison.fitting import ContrastSets, FittedDirection, PromptSample
from ray_abliterate.directions.residuals.folds import Folds
from ray_abliterate.directions.separability import (
    BehaviourValues,
    NeutralValues,
    measure_separability,
)
from ray_abliterate.recipe import DirectionSettings


@dataclass(frozen=True)
class HeldOut:
    """Coordinates of all prompts along directions that they had no part in.

    Attributes:
        behaviour: In units of the residual stream, in the order of the set.
        neutral: The same. Each fold is moved so that the middle of its two means is 0, since the
            folds' directions have their own zero.
        agreement: Mean cosine of the folds' directions.
    """

    behaviour: BehaviourValues
    neutral: NeutralValues
    agreement: float

    def measures(self) -> dict[str, float]:
        """See `separation`; and the agreement."""
        return {**measure_separability(self.behaviour, self.neutral), "agreement": self.agreement}


def measure_held_out(
    sets: ContrastSets, settings: DirectionSettings, folds: Folds | None
) -> HeldOut | FittedDirection:
    """All folds along the direction of the others; what went wrong if one has none.

    Args:
        sets: The residuals.
        settings: The method.
        folds: Of all prompts; None if there can't be two.
    """
    if folds is None:
        return FittedDirection(problem="a set of one prompt has no halves")
    vectors = []
    for fold in range(folds.count):
        others = PromptSample(*(numpy.flatnonzero(side != fold) for side in folds.sides))
        found = sets.fit(settings, others)
        if found.vector is None:
            return found
        vectors.append(found.vector)
    axes, _ = sets.axes(settings)
    along = []
    for values, numbers in zip((axes.behaviour, axes.neutral), folds.sides, strict=True):
        side = numpy.empty(len(values))
        for fold, vector in enumerate(vectors):
            side[numbers == fold] = (values[torch.from_numpy(numbers == fold)] @ vector).numpy()
        along.append(side)
    behaviour, neutral = centre_folds(along[0], along[1], folds)
    cosines = [float(one @ other) for one, other in combinations(vectors, 2)]
    return HeldOut(behaviour, neutral, float(numpy.mean(cosines)))


def centre_folds(
    behaviour: Float[numpy.ndarray, "prompt ..."],
    neutral: Float[numpy.ndarray, "other ..."],
    folds: Folds,
) -> tuple[Float[numpy.ndarray, "prompt ..."], Float[numpy.ndarray, "other ..."]]:
    """Coordinates moved so that the middle of each fold's two means is 0."""
    moved = behaviour.copy(), neutral.copy()
    for fold in range(folds.count):
        own = [numbers == fold for numbers in folds.sides]
        means = [side[rows].mean(axis=0) for side, rows in zip(moved, own, strict=True)]
        for side, rows in zip(moved, own, strict=True):
            side[rows] -= 0.5 * (means[0] + means[1])
    return moved


def random_halves(counts: tuple[int, int], seed: int) -> Folds | None:
    """Two halves of both sets, at random; prompt i stays with prompt i where sets are equal."""
    if min(counts) < 2:
        return None
    sides = []
    for count, order in zip(
        counts, shuffle_prompts(counts, numpy.random.default_rng(seed)), strict=True
    ):
        numbers = numpy.ones(count, int)
        numbers[order[: count // 2]] = 0
        sides.append(numbers)
    return Folds(2, *sides)


def shuffle_prompts(counts: tuple[int, int], random: numpy.random.Generator) -> PromptSample:
    """All prompts of both sets in a random order, the same one where sets are of equal size."""
    one = random.permutation(counts[0])
    return PromptSample(one, one if counts[0] == counts[1] else random.permutation(counts[1]))
