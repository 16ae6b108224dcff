"""Prompts dealt to folds, and statistics of residuals kept apart by fold.

What is measured along a direction should have had no part in it (cross-fitting; Stone 1974, Journal
of the Royal Statistical Society B 36). So prompts are dealt to a few folds, and each fold is
measured along the direction of all others. Statistics that merge need no other pass over the
residuals for that: what the others have is the sum of their parts.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy
from jaxtyping import Float, Int

from ray_abliterate.directions.residuals.moments import ResidualRows
from ray_abliterate.directions.residuals.shard import ResidualShard, winsorized

FOLDS = 5
"""Folds at most. Directions come from four fifths of the prompts then; more folds find the layer
that separates best no more often, fewer do so less often."""

MOST = 1000
"""Prompts of a set that are looked at where all their residuals have to be in memory."""

FoldNumbers = Int[numpy.ndarray, "_"]


@dataclass(frozen=True)
class Folds:
    """The fold of every prompt of both sets, from 0; each fold has prompts of both."""

    count: int
    behaviour: FoldNumbers
    neutral: FoldNumbers

    @classmethod
    def of(cls, behaviour: Sequence[Hashable], neutral: Sequence[Hashable]) -> "Folds | None":
        """Deal prompts in turn, by their places in their sets.

        Prompts that are the same are in one fold, in both sets, or they would be measured along
        what was found from themselves. Where sets are of equal size, so are prompt i and prompt i,
        which may be a pair.

        Args:
            behaviour: Prompts that show the behaviour.
            neutral: Prompts that don't.

        Returns:
            As many folds as can be, `FOLDS` at most; None if there can't be two.
        """
        groups = _groups(behaviour, neutral)
        for count in range(FOLDS, 1, -1):
            sides = [numpy.array([group % count for group in side]) for side in groups]
            if all(len(numpy.unique(side)) == count for side in sides):
                return cls(count, *sides)
        return None

    @property
    def sides(self) -> tuple[FoldNumbers, FoldNumbers]:
        """Of both sets."""
        return self.behaviour, self.neutral


def evenly_spaced_indices(count: int, most: int = MOST) -> FoldNumbers:
    """Places of at most so many prompts, at even distances, the first and the last among them."""
    if count <= most:
        return numpy.arange(count)
    return numpy.linspace(0, count - 1, most).round().astype(int)


def _groups(*sets: Sequence[Hashable]) -> list[list[int]]:
    """A number for every prompt, by first appearance; prompts that belong together share it."""
    leads: dict[Hashable, Hashable] = {prompt: prompt for own in sets for prompt in own}

    def lead(prompt: Hashable) -> Hashable:
        while leads[prompt] != prompt:
            leads[prompt] = prompt = leads[leads[prompt]]
        return prompt

    if len({len(own) for own in sets}) == 1:
        for one, other in zip(*sets, strict=True):
            leads[lead(other)] = lead(one)
    numbers: dict[Hashable, int] = {}
    return [[numbers.setdefault(lead(prompt), len(numbers)) for prompt in own] for own in sets]


@dataclass(frozen=True)
class ByFold:
    """A statistic of each fold's prompts; of more prompts by `+`."""

    parts: Mapping[int, Any]

    def __add__(self, other: "ByFold") -> "ByFold":
        both = {
            fold: reduce(add, [one.parts[fold] for one in (self, other) if fold in one.parts])
            for fold in sorted({*self.parts, *other.parts})
        }
        return ByFold(both)

    def without(self, fold: int) -> Any:
        """The statistic of all other folds' prompts."""
        return reduce(add, [part for number, part in self.parts.items() if number != fold])


def by_fold(batch: Any, folds: FoldNumbers, function: Callable[..., Any], *args: Any) -> ByFold:
    """`function` of each fold's rows of one shard.

    Args:
        batch: The shard.
        folds: Of all prompts of its set.
        function: Takes a shard's record batch, and gives what `+` merges.
        args: Further arguments of it.
    """
    own = _own(batch, folds)
    return ByFold(
        {
            int(fold): function(batch.take(numpy.flatnonzero(own == fold)), *args)
            for fold in numpy.unique(own)
        }
    )


def project_shard(
    batch: Any,
    vectors: Float[numpy.ndarray, "fold layer hidden"],
    folds: FoldNumbers,
    quantile: float = 1.0,
    first: int = 0,
) -> ResidualRows:
    """One shard, each prompt along its fold's unit vectors.

    Args:
        batch: The shard.
        vectors: By fold, one for each column of layers from the first one on.
        folds: Of all prompts of the shard's set.
        quantile: Residuals are winsorised first.
        first: That column.

    Returns:
        Coordinates after every layer, `"prompt layer"`.
    """
    shard, own = ResidualShard(batch), _own(batch, folds)
    # a sum of products, not a matrix product, whose bits would depend on the number of threads
    along = [
        (
            winsorized(shard.layer(first + index), quantile)
            * vectors[own, index].astype(numpy.float64)
        ).sum(axis=-1)
        for index in range(vectors.shape[1])
    ]
    return ResidualRows((numpy.stack(along, axis=-1),))


def _own(batch: Any, folds: FoldNumbers) -> FoldNumbers:
    shard = ResidualShard(batch)
    return folds[shard.first : shard.first + shard.prompts]
