"""Prompts dealt to folds, and statistics of residuals that are kept separately for each fold.

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
"""The most folds. Directions then come from four fifths of the prompts; more folds find the layer
that separates best no more often, fewer do so less often."""

MOST_PROMPTS = 1000
"""Prompts of a set that are used where all their residuals have to be in memory."""

FoldNumbers = Int[numpy.ndarray, "_"]


@dataclass(frozen=True)
class Folds:
    """The folds of both sets' prompts, each of which has prompts of both.

    Attributes:
        count: The number of folds.
        behaviour: The fold of each prompt of the behaviour set, from 0.
        neutral: The same of the neutral set.
    """

    count: int
    behaviour: FoldNumbers
    neutral: FoldNumbers

    @classmethod
    def of(cls, behaviour: Sequence[Hashable], neutral: Sequence[Hashable]) -> "Folds | None":
        """Deal prompts to folds in turn, in the order of their sets.

        Equal prompts share a fold, in both sets, or they would be measured along a direction that
        was found from themselves. Where the sets are of equal size, prompt i of one shares a fold
        with prompt i of the other, since they may be a pair.

        Args:
            behaviour: Prompts that show the behaviour.
            neutral: Prompts that don't.

        Returns:
            As many folds as possible, `FOLDS` at most; None if there can't be two.
        """
        groups = _groups(behaviour, neutral)
        for count in range(FOLDS, 1, -1):
            sides = [numpy.array([group % count for group in side]) for side in groups]
            if all(len(numpy.unique(side)) == count for side in sides):
                return cls(count, *sides)
        return None

    @property
    def sides(self) -> tuple[FoldNumbers, FoldNumbers]:
        """The folds of the behaviour's prompts, and of the neutral ones."""
        return self.behaviour, self.neutral


def evenly_spaced_indices(count: int, most: int = MOST_PROMPTS) -> FoldNumbers:
    """Return `most` of `count` indices at even distances, with the first and last; or all."""
    if count <= most:
        return numpy.arange(count)
    return numpy.linspace(0, count - 1, most).round().astype(int)


def _groups(*sets: Sequence[Hashable]) -> list[list[int]]:
    """Number the groups of prompts that belong together, by first appearance."""
    # union-find: each prompt points towards the root of its group
    parents: dict[Hashable, Hashable] = {prompt: prompt for prompts in sets for prompt in prompts}

    def root(prompt: Hashable) -> Hashable:
        while parents[prompt] != prompt:
            parents[prompt] = prompt = parents[parents[prompt]]
        return prompt

    if len({len(prompts) for prompts in sets}) == 1:  # equal sizes may mean pairs
        for one, other in zip(*sets, strict=True):
            parents[root(other)] = root(one)
    numbers: dict[Hashable, int] = {}
    return [
        [numbers.setdefault(root(prompt), len(numbers)) for prompt in prompts] for prompts in sets
    ]


@dataclass(frozen=True)
class ByFold:
    """A statistic of each fold's prompts, by fold; `+` adds the prompts of another part."""

    parts: Mapping[int, Any]

    def __add__(self, other: "ByFold") -> "ByFold":
        merged = {
            fold: reduce(add, [one.parts[fold] for one in (self, other) if fold in one.parts])
            for fold in sorted({*self.parts, *other.parts})
        }
        return ByFold(merged)

    def without(self, fold: int) -> Any:
        """Return the statistic of all other folds' prompts."""
        return reduce(add, [part for number, part in self.parts.items() if number != fold])


def by_fold(batch: Any, folds: FoldNumbers, function: Callable[..., Any], *args: Any) -> ByFold:
    """Apply `function` to each fold's rows of one shard.

    Args:
        batch: The shard's record batch.
        folds: The folds of all prompts of its set.
        function: Takes a record batch, and returns a value that `+` merges.
        args: Further arguments of it.
    """
    shard_folds = _folds_of_shard(batch, folds)
    return ByFold(
        {
            int(fold): function(batch.take(numpy.flatnonzero(shard_folds == fold)), *args)
            for fold in numpy.unique(shard_folds)
        }
    )


def project_shard(
    batch: Any,
    vectors: Float[numpy.ndarray, "fold layer hidden"],
    folds: FoldNumbers,
    quantile: float = 1.0,
    first: int = 0,
) -> ResidualRows:
    """Project each prompt of one shard onto its fold's unit vectors.

    Args:
        batch: The shard's record batch.
        vectors: Unit vectors by fold, one for each column of layers from `first` on.
        folds: The folds of all prompts of the shard's set.
        quantile: At which residuals are winsorised first; 1 changes nothing.
        first: The first column.

    Returns:
        Coordinates after every layer, `"prompt layer"`.
    """
    shard, shard_folds = ResidualShard(batch), _folds_of_shard(batch, folds)
    # a sum of products, not a matrix product, whose bits would depend on the number of threads
    along = [
        (
            winsorized(shard.layer(first + index), quantile)
            * vectors[shard_folds, index].astype(numpy.float64)  # (prompt, hidden)
        ).sum(axis=-1)
        for index in range(vectors.shape[1])
    ]
    return ResidualRows((numpy.stack(along, axis=-1),))


def _folds_of_shard(batch: Any, folds: FoldNumbers) -> FoldNumbers:
    shard = ResidualShard(batch)
    return folds[shard.first : shard.first + shard.prompts]
