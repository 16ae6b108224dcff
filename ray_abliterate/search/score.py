"""Scores: finite values with an interval, a goal and a name; a trial's scorecard; intervals.

Pure values; knows nothing about models or scorers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_abliterate.errors import ScoreError
from ray_abliterate.recipe import Goal

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Score:
    """One number about one model: `low <= value <= high`, a 95 % interval.

    `detail` holds counts and parts that explain the value; numbers and short texts only. With
    `bound`, the value is only the best that this score could still have been: the trial was
    pruned, and `low` to `high` is where the score lies for certain.

    Raises:
        ScoreError: a number is not finite, or the interval does not hold the value.
    """

    name: str
    value: float
    low: float
    high: float
    goal: Goal = "minimize"
    unit: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    bound: bool = False

    def __post_init__(self) -> None:
        for label in ("value", "low", "high"):
            if not math.isfinite(getattr(self, label)):
                raise ScoreError(
                    f"{self.name}: {label} is {getattr(self, label)}, not a finite number"
                )
        if not self.low <= self.value <= self.high:
            raise ScoreError(f"{self.name}: {self.value} is outside [{self.low}, {self.high}]")

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain JSON values."""
        return {
            "name": self.name,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "goal": self.goal,
            "unit": self.unit,
            "detail": dict(self.detail),
            "bound": self.bound,
        }

    @property
    def loss(self) -> float:
        """The value with its sign such that smaller is better."""
        return -self.value if self.goal == "maximize" else self.value

    @property
    def relation(self) -> str:
        """The sign before the value where people read it: `≥ ` or `≤ ` of a bound, else nothing."""
        return ("≤ " if self.goal == "maximize" else "≥ ") if self.bound else ""


@dataclass(frozen=True)
class Scorecard:
    """The scores of one trial, in the recipe's order: the one order for names and values.

    Raises:
        ScoreError: there is no score.
    """

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.scores:
            raise ScoreError("a scorecard needs at least one score")

    def __getitem__(self, name: str) -> Score:
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(name)

    @property
    def objectives(self) -> tuple[Score, ...]:
        """The scores that the search optimises; `report` scores are none."""
        return tuple(score for score in self.scores if score.goal != "report")

    @property
    def losses(self) -> tuple[float, ...]:
        """The objectives' values with signs such that smaller is better."""
        return tuple(score.loss for score in self.objectives)

    @property
    def pruned(self) -> bool:
        """Whether some score is only a bound, because the trial was stopped early."""
        return any(score.bound for score in self.scores)

    def metrics(self) -> dict[str, float]:
        """Return flat values for Tune: `kl-divergence`, `kl-divergence/low`, `…/high`."""
        flat: dict[str, float] = {}
        for score in self.scores:
            flat[score.name] = score.value
            flat[f"{score.name}/low"], flat[f"{score.name}/high"] = score.low, score.high
        return flat

    def to_list(self) -> list[dict[str, Any]]:
        """Return the scores as plain JSON values."""
        return [score.to_dict() for score in self.scores]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> "Scorecard":
        """Build a scorecard from `to_list`'s output; older lists have no `bound`, so no bounds."""
        return cls(tuple(Score(**value) for value in values))


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate (Wilson 1927); 0 of 20 gives 0 to 0.161.

    Raises:
        ValueError: `total` is 0, or `hits` is not between 0 and `total`.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"no rate of {hits} in {total}")
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(method="wilson")
    rate = hits / total  # rounding may put an end of the interval on its wrong side
    return max(0.0, min(rate, float(interval.low))), min(1.0, max(rate, float(interval.high)))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and its 95 % interval by the percentile bootstrap.

    2,000 draws with a fixed seed: the same values always give the same interval.
    """
    import numpy

    array = numpy.asarray(values, dtype=numpy.float64)
    mean = float(array.mean())
    # (draw, value)
    draws = numpy.random.default_rng(0).integers(0, len(array), size=(2000, len(array)))
    low, high = numpy.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return mean, min(float(low), mean), max(float(high), mean)
