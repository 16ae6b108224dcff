"""Both sets of a run, each fold of them along the directions of all other folds, layer by layer.

Wherever residuals are: what reduces them is handed in. What a method finds from means or variances
is found and measured where they lie; of any other method one layer is here at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.comparison.fitting import ContrastSets, unsaid
from ray_abliterate.directions.comparison.held_out import HeldOut, centre_folds, measure_held_out
from ray_abliterate.directions.compute import directions_from_moments, directions_from_sums, need_of
from ray_abliterate.directions.directions import Directions, NoDirection
from ray_abliterate.directions.residuals.folds import (
    ByFold,
    Folds,
    by_fold,
    evenly_spaced_indices,
    project_shard,
)
from ray_abliterate.directions.residuals.moments import moments_of, rows_of
from ray_abliterate.directions.residuals.shard import sums_of
from ray_abliterate.recipe import DirectionSettings

REDUCIBLE_NEEDS: dict[str, tuple[Callable[..., Any], Callable[..., Directions]]] = {
    "means": (sums_of, directions_from_sums),
    "variances": (moments_of, directions_from_moments),
}
"""Needs that are reduced where residuals are: how, and what finds directions from both sets'."""

Along = Float[numpy.ndarray, "_ layer"]
Reduce = Callable[..., Any]
"""Name of a set, function of a shard, its other arguments; gives what all shards' add up to."""


def cross_fitted_coordinates(
    reduced: Reduce, sets: Sequence[PromptSet], settings: DirectionSettings, columns: range
) -> list[Along]:
    """Coordinates of both sets' prompts; zeros at layers where a fold's others have no direction.

    Of a method that wants residuals, no more prompts are measured than can be here at once.

    Args:
        reduced: Reduces all shards of a set.
        sets: The prompts.
        settings: The method.
        columns: Layers of the shards.
    """
    known = need_of(settings) in REDUCIBLE_NEEDS
    places = [numpy.arange(len(s)) if known else evenly_spaced_indices(len(s)) for s in sets]
    both = zip(sets, places, strict=True)
    folds = Folds.of(*([s.prompts[place].normalized for place in own] for s, own in both))
    if folds is not None and known:
        return _reduced_along(reduced, [s.name for s in sets], settings, columns, folds)
    along = [numpy.zeros((len(own), len(columns))) for own in places]
    for index, column in enumerate(columns if folds is not None else ()):
        rows = [
            reduced(s.name, rows_of, column, settings.winsorize_quantile, own).values
            for s, own in zip(sets, places, strict=True)
        ]
        fetched = ContrastSets(*map(torch.from_numpy, rows))
        found = measure_held_out(fetched, settings, folds) if fetched.differ else None
        if isinstance(found, HeldOut):
            along[0][:, index], along[1][:, index] = found.behaviour, found.neutral
    return along


def _reduced_along(
    reduced: Reduce,
    names: Sequence[str],
    settings: DirectionSettings,
    columns: range,
    folds: Folds,
) -> list[Along]:
    function, _ = REDUCIBLE_NEEDS[need_of(settings)]
    quantile = settings.winsorize_quantile
    sides = list(zip(names, folds.sides, strict=True))
    parts = [reduced(name, by_fold, own, function, quantile, columns) for name, own in sides]
    vectors = leave_one_fold_out(parts[0], parts[1], settings, folds)
    if vectors is None:
        return [numpy.zeros((len(own), len(columns))) for own in folds.sides]
    rows = [
        reduced(name, project_shard, vectors, own, quantile, columns.start).values
        for name, own in sides
    ]
    return list(centre_folds(rows[0], rows[1], folds))


def leave_one_fold_out(
    behaviour: ByFold, neutral: ByFold, settings: DirectionSettings, folds: Folds
) -> Float[numpy.ndarray, "fold layer hidden"] | None:
    """Unit vectors of each fold's others; zeros where one of them has none, None if all are.

    Args:
        behaviour: Statistics that the method needs, of one set.
        neutral: Of the other one.
        settings: The method.
        folds: Which there are.
    """
    _, find = REDUCIBLE_NEEDS[need_of(settings)]
    found = []
    for fold in range(folds.count):
        try:
            with unsaid():
                directions = find(behaviour.without(fold), neutral.without(fold), settings, {})
        except NoDirection:
            return None
        found.append(directions.vectors.numpy())
    vectors: Float[numpy.ndarray, "fold layer hidden"] = numpy.stack(found)
    vectors *= numpy.any(vectors, axis=-1, keepdims=True).all(axis=0)
    return vectors
