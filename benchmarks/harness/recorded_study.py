"""A recorded study as a function: any point of its space to a refusal rate and a KL divergence.

`results/demo_plans.jsonl` holds the plans of the study that `results/dominance_study.jsonl` holds
the answers of: 40 trials of the demo. 36 of them have a direction per layer; the other 4 are too
few to say anything about directions that are shared, so the function is of plans like the 36. Two
Gaussian processes go through their points, one for the log of the divergence, one for the log odds
of the rate, each about a plane in the mean strengths of the components. What they say between the
points is smooth and plausible, no more; it is the same in every run. Knows neither Optuna nor Ray.
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

from ray_abliterate.recipe import SpaceSettings
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import ModelShape, Plan, Range, Space
from ray_abliterate.search.score import Score, Scorecard, wilson

STUDY = Path(__file__).parents[1] / "results" / "demo_plans.jsonl"
SPACE = Space.of(ModelShape(30, 576, ("attn", "mlp")), SpaceSettings(scope=("per-layer",)), "row")
"""The space of the recorded study, directions per layer only."""
JITTER = 1e-8
"""Variance of noise, in units of the process's: the recorded points come back to six digits."""


@dataclass(frozen=True)
class Point:
    """A recorded trial, or what one would have given."""

    plan: Plan
    hits: int
    total: int
    kl: float

    @property
    def rate(self) -> float:
        """Share of answers that refuse."""
        return self.hits / self.total

    def trial(self, number: int) -> Trial:
        """As a finished trial."""
        low, high = wilson(self.hits, self.total)
        detail = {"hits": self.hits, "total": self.total, "empty": 0, "degenerate": 0}
        scores = (
            Score("rate", self.rate, low, high, detail=detail),
            Score("kl", self.kl, self.kl, self.kl, unit="nats per token"),
        )
        return Trial(number, self.plan, Scorecard(scores), 1.0)


def recorded(file: Path = STUDY) -> list[Point]:
    """The trials of the study that have a direction per layer, in order."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    points = [
        Point(Plan.from_json(json.dumps(r["plan"])), r["hits"], r["total"], r["kl"]) for r in rows
    ]
    return [point for point in points if point.plan.scope == "per-layer"]


class Surrogate:
    """Any plan's scores, by what was recorded near it."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._total = points[0].total
        places = np.array([place(point.plan.to_params()) for point in points])
        planes = np.array([plane(point.plan) for point in points])
        self._log_kl = Process.fit(places, planes, np.log([p.kl for p in points]))
        self._odds = Process.fit(places, planes, np.array([odds(p) for p in points]))

    @property
    def left_out_errors(self) -> dict[str, float]:
        """Errors where a recorded trial is left out, as shares of the recorded deviation."""
        processes = {"log_kl": self._log_kl, "log_odds_of_the_rate": self._odds}
        return {n: round(float(p.left_out_error / p.deviation), 3) for n, p in processes.items()}

    def point(self, params: Mapping[str, Any]) -> Point:
        """What a trial of these parameters, in the recorded study's space, would have given."""
        plan = SPACE.plan(params)
        where, on = place(params), plane(plan)
        share = 1 / (1 + math.exp(-self._odds.at(where, on)))
        hits = round(share * (self._total + 1) - 0.5)
        kl = math.exp(self._log_kl.at(where, on))
        return Point(plan, min(max(hits, 0), self._total), self._total, kl)


def odds(point: Point) -> float:
    """Log odds of a refusal; half a hit more on either side, so that 0 and all are finite."""
    return math.log((point.hits + 0.5) / (point.total - point.hits + 0.5))


def place(params: Mapping[str, Any]) -> np.ndarray:
    """Where a point's profiles lie in the unit cube; a shared direction's layer is not used."""
    ranges = [(n, d) for n, d in SPACE.parameters if "." in n and isinstance(d, Range)]
    return np.array([(params[n] - d.low) / (d.high - d.low) for n, d in ranges])


def plane(plan: Plan) -> np.ndarray:
    """1, and the mean strength over all layers of each component."""
    layers = SPACE.shape.layers
    means = [sum(plan.strengths(c, layers)) / layers for c in SPACE.shape.components]
    return np.array([1.0, *means])


@dataclass(frozen=True)
class Process:
    """A Gaussian process about a plane, conditioned on recorded values."""

    places: np.ndarray
    lengths: np.ndarray
    slopes: np.ndarray
    weights: np.ndarray
    left_out_error: float
    """Root mean square of the errors at each recorded place, predicted from the others."""
    deviation: float
    """Standard deviation of the recorded values."""

    @classmethod
    def fit(cls, places: np.ndarray, planes: np.ndarray, values: np.ndarray) -> "Process":
        """With the lengths per parameter that explain the values best (marginal likelihood)."""
        spread = values.std()
        start = np.zeros(places.shape[1])
        objective = lambda x: _unlikeliness(np.exp(x), places, planes, values)  # noqa: E731
        found = minimize(objective, start, method="L-BFGS-B", bounds=[(-1.5, 2.5)] * len(start))
        lengths = np.exp(found.x)
        factor, slopes = _condition(lengths, places, planes, values)
        weights = cho_solve(factor, values - planes @ slopes)
        inverse = cho_solve(factor, np.eye(len(values)))
        errors = weights / np.diag(inverse)
        return cls(places, lengths, slopes, weights, float(np.sqrt((errors**2).mean())), spread)

    def at(self, where: np.ndarray, on: np.ndarray) -> float:
        """The mean at a place."""
        near = _kernel(where[None] / self.lengths, self.places / self.lengths)[0]
        return float(on @ self.slopes + near @ self.weights)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matérn 5/2: smooth, but not so smooth that a gap between points swings."""
    distance = np.sqrt(5 * ((a[:, None] - b[None]) ** 2).sum(-1))
    return (1 + distance + distance**2 / 3) * np.exp(-distance)


def _condition(
    lengths: np.ndarray, places: np.ndarray, planes: np.ndarray, values: np.ndarray
) -> tuple[Any, np.ndarray]:
    """The kernel's factor, and the plane of generalised least squares."""
    scaled = places / lengths
    factor = cho_factor(_kernel(scaled, scaled) + JITTER * np.eye(len(values)))
    carried = cho_solve(factor, planes)
    slopes = np.linalg.solve(
        planes.T @ carried + 1e-6 * np.eye(planes.shape[1]), carried.T @ values
    )
    return factor, slopes


def _unlikeliness(
    lengths: np.ndarray, places: np.ndarray, planes: np.ndarray, values: np.ndarray
) -> float:
    """Minus the log marginal likelihood, scale profiled out; up to a constant."""
    factor, slopes = _condition(lengths, places, planes, values)
    left = values - planes @ slopes
    fit = float(left @ cho_solve(factor, left))
    return 0.5 * len(values) * math.log(fit) + float(np.log(np.diag(factor[0])).sum())
