"""How well a method's direction separates prompts that it was not found from.

A direction separates the prompts that it was found from better than any others, the more so the
fewer they are compared with the units; with more units than prompts nearly any two sets can be
separated. So prompts are dealt to folds, and each fold is measured along the direction of all
others: here two halves, whose directions share no prompt, so that their cosine says how stable the
method is.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.directions.comparison.fitting import (
    ContrastSets,
    FittedDirection,
    PromptSample,
)
from ray_abliterate.directions.residuals.folds import Folds
from ray_abliterate.directions.separability import (
    BehaviourValues,
    NeutralValues,
    measure_separability,
)
from ray_abliterate.recipe import DirectionSettings


@dataclass(frozen=True)
class HeldOut:
    """Coordinates of all prompts along directions that were found without them.

    Attributes:
        behaviour: In units of the residual stream, in the order of the set.
        neutral: The same. Each fold is shifted so that the midpoint of its two means is 0, since
            the folds' directions have different zeros.
        agreement: Mean cosine of the folds' directions.
    """

    behaviour: BehaviourValues
    neutral: NeutralValues
    agreement: float

    def measures(self) -> dict[str, float]:
        """Return the measures of `separability` by name, and the agreement."""
        measures = measure_separability(self.behaviour, self.neutral)
        return {**measures, "agreement": self.agreement}


def measure_held_out(
    sets: ContrastSets, settings: DirectionSettings, folds: Folds | None
) -> HeldOut | FittedDirection:
    """Project each fold onto the direction of all others.

    Args:
        sets: The residuals.
        settings: The method.
        folds: The folds of all prompts; None if there can't be two.

    Returns:
        The coordinates; or, if a fold's others have no direction, the fit that says why.
    """
    if folds is None:
        return FittedDirection(problem="a set of one prompt has no halves")
    vectors = []
    for fold in range(folds.count):
        others = PromptSample(*(numpy.flatnonzero(side != fold) for side in folds.sides))
        fitted = sets.fit(settings, others)
        if fitted.vector is None:
            return fitted
        vectors.append(fitted.vector)
    axes, _ = sets.axes(settings)
    along = []
    for values, fold_of in zip((axes.behaviour, axes.neutral), folds.sides, strict=True):
        side = numpy.empty(len(values))
        for fold, vector in enumerate(vectors):
            is_held_out = fold_of == fold  # (prompt)
            side[is_held_out] = (values[torch.from_numpy(is_held_out)] @ vector).numpy()
        along.append(side)
    behaviour, neutral = centre_folds(along[0], along[1], folds)
    cosines = [float(one @ other) for one, other in combinations(vectors, 2)]
    return HeldOut(behaviour, neutral, float(numpy.mean(cosines)))


def centre_folds(
    behaviour: Float[numpy.ndarray, "prompt ..."],
    neutral: Float[numpy.ndarray, "other ..."],
    folds: Folds,
) -> tuple[Float[numpy.ndarray, "prompt ..."], Float[numpy.ndarray, "other ..."]]:
    """Shift coordinates so that the midpoint of each fold's two means is 0."""
    shifted = behaviour.copy(), neutral.copy()
    for fold in range(folds.count):
        members = [fold_of == fold for fold_of in folds.sides]
        means = [side[rows].mean(axis=0) for side, rows in zip(shifted, members, strict=True)]
        for side, rows in zip(shifted, members, strict=True):
            side[rows] -= 0.5 * (means[0] + means[1])
    return shifted


def random_halves(counts: tuple[int, int], seed: int) -> Folds | None:
    """Divide both sets into two random halves; None if a set has one prompt only.

    Where the sets are of equal size, prompt i of one is in the same half as prompt i of the other.
    """
    if min(counts) < 2:
        return None
    sides = []
    random = numpy.random.default_rng(seed)
    for count, order in zip(counts, shuffle_prompts(counts, random), strict=True):
        fold_of = numpy.ones(count, int)
        fold_of[order[: count // 2]] = 0
        sides.append(fold_of)
    return Folds(2, *sides)


def shuffle_prompts(counts: tuple[int, int], random: numpy.random.Generator) -> PromptSample:
    """Return all prompts of both sets in random order, in the same one if sizes are equal."""
    one = random.permutation(counts[0])
    return PromptSample(one, one if counts[0] == counts[1] else random.permutation(counts[1]))
