"""A recorded study as a function: any point of its space to a refusal rate and a KL divergence.

`results/demo_plans.jsonl` holds the plans of the study that `results/dominance_study.jsonl` holds
the answers of: 40 trials of the demo. 36 of them have a direction per layer; the other 4 are too
few to say anything about directions that are shared, so the function is of plans like the 36. Two
Gaussian processes go through their points, one for the log of the divergence, one for the log odds
of the rate, each about a plane in the mean strengths of the components. Their values between the
points are smooth and plausible, no more; they are the same in every run. Knows neither Optuna nor
Ray.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from benchmarks.harness.record import RESULTS
from ray_abliterate.recipe import SpaceSettings
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard, wilson
from ray_abliterate.search.space import RealRange, SearchSpace

STUDY = RESULTS / "demo_plans.jsonl"
SPACE = SearchSpace.of(
    ModelShape(30, 576, ("attn", "mlp")), SpaceSettings(scope=("per-layer",)), "row"
)
"""The space of the recorded study, directions per layer only."""
JITTER = 1e-8
"""Variance of the noise in units of the process's: recorded points come back to six digits."""


@dataclass(frozen=True)
class RecordedPoint:
    """A recorded trial, or one that the surrogate predicts.

    Attributes:
        plan: The plan.
        hits: Answers that refuse.
        total: Answers in all.
        kl: KL divergence in nats per token.
    """

    plan: Plan
    hits: int
    total: int
    kl: float

    @property
    def rate(self) -> float:
        """Share of the answers that refuse."""
        return self.hits / self.total

    def trial(self, number: int) -> Trial:
        """Return the point as a finished trial of this number."""
        low, high = wilson(self.hits, self.total)
        detail = {"hits": self.hits, "total": self.total, "empty": 0, "degenerate": 0}
        scores = (
            Score("rate", self.rate, low, high, detail=detail),
            Score("kl", self.kl, self.kl, self.kl, unit="nats per token"),
        )
        return Trial(number, self.plan, Scorecard(scores), 1.0)


def recorded_points(file: Path = STUDY) -> list[RecordedPoint]:
    """Read the trials of the study that have a direction per layer, in order."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    points = [
        RecordedPoint(Plan.from_json(json.dumps(r["plan"])), r["hits"], r["total"], r["kl"])
        for r in rows
    ]
    return [point for point in points if point.plan.scope == "per-layer"]


class Surrogate:
    """Predicts any plan's scores from the recorded ones near it."""

    def __init__(self, points: Sequence[RecordedPoint]) -> None:
        self._total = points[0].total
        positions = np.array([coordinates(point.plan.to_params()) for point in points])
        planes = np.array([plane(point.plan) for point in points])
        self._log_kl = GaussianProcess.fit(positions, planes, np.log([p.kl for p in points]))
        self._odds = GaussianProcess.fit(positions, planes, np.array([odds(p) for p in points]))

    @property
    def left_out_errors(self) -> dict[str, float]:
        """Errors at recorded trials that are left out, as shares of the recorded deviation."""
        processes = {"log_kl": self._log_kl, "log_odds_of_the_rate": self._odds}
        return {n: round(float(p.left_out_error / p.deviation), 3) for n, p in processes.items()}

    def point(self, params: Mapping[str, Any]) -> RecordedPoint:
        """Predict the trial of these parameters, which lie in the recorded study's space."""
        plan = SPACE.plan(params)
        position, basis = coordinates(params), plane(plan)
        share = 1 / (1 + math.exp(-self._odds.at(position, basis)))
        hits = round(share * (self._total + 1) - 0.5)
        kl = math.exp(self._log_kl.at(position, basis))
        return RecordedPoint(plan, min(max(hits, 0), self._total), self._total, kl)


def odds(point: RecordedPoint) -> float:
    """Return the log odds of a refusal, finite by half a hit more on either side."""
    return math.log((point.hits + 0.5) / (point.total - point.hits + 0.5))


def coordinates(params: Mapping[str, Any]) -> np.ndarray:
    """Return where a plan's profiles lie in the unit cube, without a shared direction's layer."""
    ranges = [(n, d) for n, d in SPACE.parameters if "." in n and isinstance(d, RealRange)]
    return np.array([(params[n] - d.low) / (d.high - d.low) for n, d in ranges])


def plane(plan: Plan) -> np.ndarray:
    """Return 1 and the mean strength over all layers of each component."""
    layers = SPACE.shape.layers
    means = [sum(plan.strengths(c, layers)) / layers for c in SPACE.shape.components]
    return np.array([1.0, *means])


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process about a plane, conditioned on recorded values.

    Attributes:
        positions: Recorded points in the unit cube, `"point parameter"`.
        lengths: Length scale of each parameter.
        slopes: Coefficients of the plane.
        weights: Weights of the kernel's values at the recorded points.
        left_out_error: Root mean square of the errors at each recorded point, predicted from the
            others.
        deviation: Standard deviation of the recorded values.
    """

    positions: np.ndarray
    lengths: np.ndarray
    slopes: np.ndarray
    weights: np.ndarray
    left_out_error: float
    deviation: float

    @classmethod
    def fit(
        cls, positions: np.ndarray, planes: np.ndarray, values: np.ndarray
    ) -> "GaussianProcess":
        """Fit the length scales that explain the values best (by marginal likelihood).

        Args:
            positions: Points in the unit cube, `"point parameter"`.
            planes: The plane's basis at each point, `"point basis"`.
            values: What was recorded at each point.
        """
        spread = values.std()
        start = np.zeros(positions.shape[1])
        objective = lambda x: _negative_log_likelihood(np.exp(x), positions, planes, values)  # noqa: E731
        fitted = minimize(objective, start, method="L-BFGS-B", bounds=[(-1.5, 2.5)] * len(start))
        lengths = np.exp(fitted.x)
        factor, slopes = _condition(lengths, positions, planes, values)
        weights = cho_solve(factor, values - planes @ slopes)
        inverse = cho_solve(factor, np.eye(len(values)))
        errors = weights / np.diag(inverse)
        return cls(positions, lengths, slopes, weights, float(np.sqrt((errors**2).mean())), spread)

    def at(self, position: np.ndarray, basis: np.ndarray) -> float:
        """Return the mean at a position, where the plane's basis has these values."""
        covariances = _kernel(position[None] / self.lengths, self.positions / self.lengths)[0]
        return float(basis @ self.slopes + covariances @ self.weights)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Matérn 5/2 covariances: smooth, but not so smooth that a gap between points swings."""
    distance = np.sqrt(5 * ((a[:, None] - b[None]) ** 2).sum(-1))
    covariances: np.ndarray = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return covariances


def _condition(
    lengths: np.ndarray, positions: np.ndarray, planes: np.ndarray, values: np.ndarray
) -> tuple[Any, np.ndarray]:
    """Return the kernel's Cholesky factor, and the plane of generalised least squares."""
    scaled = positions / lengths
    factor = cho_factor(_kernel(scaled, scaled) + JITTER * np.eye(len(values)))
    solved = cho_solve(factor, planes)
    slopes = np.linalg.solve(planes.T @ solved + 1e-6 * np.eye(planes.shape[1]), solved.T @ values)
    return factor, slopes


def _negative_log_likelihood(
    lengths: np.ndarray, positions: np.ndarray, planes: np.ndarray, values: np.ndarray
) -> float:
    """Return minus the log marginal likelihood, with the scale profiled out, up to a constant."""
    factor, slopes = _condition(lengths, positions, planes, values)
    residual = values - planes @ slopes
    fit = float(residual @ cho_solve(factor, residual))
    return 0.5 * len(values) * math.log(fit) + float(np.log(np.diag(factor[0])).sum())
