"""The sampler: Optuna's TPE, made so that a plan costs little more in a long study than in a short.

Knows Optuna's sampler from the inside. Its suggestions are Optuna's: two steps that take most of
the time in a study of thousands of trials are computed otherwise, with the same results.

* A candidate's density is a sum over one kernel per trial. Optuna takes candidates x kernels x
  parameters apart; the exponent of a product of normals is a quadratic form, so that two matrix
  products give all of them at once.
* The parameters of a finished trial are turned into numbers once, not for each plan.
"""

import math
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import (
    _BatchedCategoricalDistributions,
    _BatchedTruncNormDistributions,
)
from optuna.trial import FrozenTrial
from scipy.special import ndtr


class QuickSampler(TPESampler):  # type: ignore[misc]
    """TPE for one study of real and categorical parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._parzen_estimator_cls = QuickDensity
        self._named: tuple[str, ...] = ()
        self._numbers = np.empty((0, 0))
        """Parameters as numbers, a row per trial by its number; NaN where not read yet."""

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Any
    ) -> dict[str, np.ndarray]:
        """Parameters as numbers, an array per name; those of finished trials are kept."""
        if self._named != tuple(search_space):
            self._named, self._numbers = tuple(search_space), np.empty((0, len(search_space)))
        rows = np.array([trial.number for trial in trials], dtype=int)
        self._make_room(rows.max(initial=-1) + 1)
        found = self._numbers[rows]
        for at in np.flatnonzero(np.isnan(found).any(axis=1)):
            own = super()._get_internal_repr([trials[at]], search_space, study)
            for column, name in enumerate(self._named):
                found[at, column] = own[name][0] if len(own[name]) else np.nan
            if trials[at].state.is_finished():
                self._numbers[rows[at]] = found[at]
        whole = found[~np.isnan(found).any(axis=1)]
        return dict(zip(self._named, whole.T, strict=True))

    def _make_room(self, trials: int) -> None:
        """Rows for so many trials, and as many again, so that this is rare."""
        held = len(self._numbers)
        if trials > held:
            more = np.full((2 * trials - held, len(self._named)), np.nan)
            self._numbers = np.concatenate([self._numbers, more])


class QuickDensity(_ParzenEstimator):  # type: ignore[misc]
    """A mixture with one kernel per trial, each a product over the parameters."""

    def log_pdf(self, samples_dict: dict[str, np.ndarray]) -> np.ndarray:
        """Log density of each candidate."""
        mixture = self._mixture_distribution
        points = self._transform(samples_dict)
        found = np.log(mixture.weights)[None, :].repeat(len(points), axis=0)
        real: list[tuple[np.ndarray, Any]] = []
        for column, kernels in enumerate(mixture.distributions):
            if isinstance(kernels, _BatchedCategoricalDistributions):
                found += np.log(kernels.weights.T)[points[:, column].astype(int)]
            elif isinstance(kernels, _BatchedTruncNormDistributions):
                real.append((points[:, column], kernels))
            else:
                given: np.ndarray = super().log_pdf(samples_dict)
                return given
        if real:
            found += _log_normals(real)
        largest = found.max(axis=1, keepdims=True)
        found -= largest
        np.exp(found, out=found)
        summed: np.ndarray = np.log(found.sum(axis=1)) + largest[:, 0]
        return summed


def _log_normals(parameters: list[tuple[np.ndarray, Any]]) -> np.ndarray:
    """Log of the product of truncated normals, for each candidate and kernel.

        sum of -(x - m)² / 2s² - log(s Z √2π)  =  -(x² · 1/2s²) + (x · m/s²) - what no x is in

    with Z the mass between the bounds. Values are taken from the middle of their range, so that
    the squares don't swamp the differences.
    """
    middle = np.array([0.5 * (kernels.low + kernels.high) for _, kernels in parameters])
    points = np.array([values for values, _ in parameters]).T - middle
    means = np.array([kernels.mu for _, kernels in parameters]).T - middle
    widths = np.array([kernels.sigma for _, kernels in parameters]).T
    half = np.array([0.5 * (kernels.high - kernels.low) for _, kernels in parameters])
    mass = ndtr((half - means) / widths) - ndtr((-half - means) / widths)
    precision = widths**-2
    constant = 0.5 * means**2 * precision + np.log(widths * mass * math.sqrt(2 * math.pi))
    squares = 0.5 * points**2 @ precision.T
    found: np.ndarray = points @ (means * precision).T - squares - constant.sum(axis=1)
    return found
