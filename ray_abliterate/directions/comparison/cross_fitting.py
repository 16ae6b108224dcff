"""Measures both sets of a run along directions of other folds (cross-fitting), layer by layer.

Wherever residuals lie, the caller passes what reduces them there. A method that needs means or
variances is fitted and measured where they lie; for any other, one layer at a time is fetched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.comparison.fitting import ContrastSets, drop_warning
from ray_abliterate.directions.comparison.held_out import HeldOut, centre_folds, measure_held_out
from ray_abliterate.directions.compute import directions_from_moments, directions_from_sums
from ray_abliterate.directions.directions import Directions, NoDirection
from ray_abliterate.directions.methods.recipe_methods import need_of
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
"""Needs whose statistics are summed where residuals lie: the reduction of a shard, and what
computes directions from both sets' sums."""

Coordinates = Float[numpy.ndarray, "_ layer"]
Reduce = Callable[..., Any]
"""Called with a set's name, a function of a shard and its further arguments; returns the sum over
all shards."""


def cross_fitted_coordinates(
    reduced: Reduce, sets: Sequence[PromptSet], settings: DirectionSettings, columns: range
) -> list[Coordinates]:
    """Return coordinates of both sets' prompts, each along the direction of all other folds.

    They are zeros at layers where a fold's others have no direction. With a method that needs
    residuals, no more prompts are measured than fit in memory at once.

    Args:
        reduced: Reduces all shards of a set.
        sets: The prompts.
        settings: The method.
        columns: The layers' columns in the shards.
    """
    is_reducible = need_of(settings) in REDUCIBLE_NEEDS
    measured = [
        numpy.arange(len(s)) if is_reducible else evenly_spaced_indices(len(s)) for s in sets
    ]
    by_set = zip(sets, measured, strict=True)
    folds = Folds.of(*([s.prompts[i].normalized for i in indices] for s, indices in by_set))
    if folds is not None and is_reducible:
        return _reduced_coordinates(reduced, [s.name for s in sets], settings, columns, folds)
    along = [numpy.zeros((len(indices), len(columns))) for indices in measured]
    for index, column in enumerate(columns if folds is not None else ()):
        rows = [
            reduced(s.name, rows_of, column, settings.winsorize_quantile, indices).values
            for s, indices in zip(sets, measured, strict=True)
        ]
        fetched = ContrastSets(*map(torch.from_numpy, rows))
        held_out = measure_held_out(fetched, settings, folds) if fetched.means_differ else None
        if isinstance(held_out, HeldOut):
            along[0][:, index], along[1][:, index] = held_out.behaviour, held_out.neutral
    return along


def _reduced_coordinates(
    reduced: Reduce,
    names: Sequence[str],
    settings: DirectionSettings,
    columns: range,
    folds: Folds,
) -> list[Coordinates]:
    """Do the same where statistics are summed where residuals lie, in two passes over shards."""
    function, _ = REDUCIBLE_NEEDS[need_of(settings)]
    quantile = settings.winsorize_quantile
    sides = list(zip(names, folds.sides, strict=True))
    parts = [
        reduced(name, by_fold, fold_of, function, quantile, columns) for name, fold_of in sides
    ]
    vectors = leave_one_fold_out(parts[0], parts[1], settings, folds)
    if vectors is None:
        return [numpy.zeros((len(fold_of), len(columns))) for fold_of in folds.sides]
    rows = [
        reduced(name, project_shard, vectors, fold_of, quantile, columns.start).values
        for name, fold_of in sides
    ]
    return list(centre_folds(rows[0], rows[1], folds))


def leave_one_fold_out(
    behaviour: ByFold, neutral: ByFold, settings: DirectionSettings, folds: Folds
) -> Float[numpy.ndarray, "fold layer hidden"] | None:
    """Return the unit vectors that each fold's others give.

    Args:
        behaviour: Statistics that the method needs, by fold.
        neutral: The same of the neutral set.
        settings: The method.
        folds: The folds.

    Returns:
        Zeros at layers where the others of some fold have no direction; None if a fold's others
        have none at any layer.
    """
    _, compute = REDUCIBLE_NEEDS[need_of(settings)]
    by_fold = []
    for fold in range(folds.count):
        others = behaviour.without(fold), neutral.without(fold)
        try:
            directions = compute(*others, settings, {}, drop_warning)
        except NoDirection:
            return None
        by_fold.append(directions.vectors.numpy())
    vectors: Float[numpy.ndarray, "fold layer hidden"] = numpy.stack(by_fold)
    # a layer is measured along every fold's direction, or not at all
    vectors *= numpy.any(vectors, axis=-1, keepdims=True).all(axis=0)
    return vectors
