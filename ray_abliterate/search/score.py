"""Scores: finite values with an interval, a goal and a name; the scorecard of a trial; intervals.

Pure values; knows nothing about models or scorers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_abliterate.errors import ScoreError
from ray_abliterate.recipe import Goal

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """One number about one model: `low <= value <= high`, a 95 % interval.

    `detail` holds counts and parts that explain the value; numbers and short texts only. With
    `bound`, the value is only the best that this score could still have been: the trial was
    stopped, and `low` to `high` is where the score lies for certain.

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
                raise ScoreError(f"{self.name}: {label} is {getattr(self, label)}, not a number")
        if not self.low <= self.value <= self.high:
            raise ScoreError(f"{self.name}: {self.value} is outside [{self.low}, {self.high}]")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
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
        """The value, turned so that smaller is better."""
        return -self.value if self.goal == "maximize" else self.value

    @property
    def relation(self) -> str:
        """What stands before the value where people read it: `≥ ` or `≤ ` if it is a bound."""
        return ("≤ " if self.goal == "maximize" else "≥ ") if self.bound else ""


@dataclass(frozen=True)
class Scorecard:
    """The scores of one trial, in the recipe's order: the one order for names and values."""

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
        """The scores that are searched for."""
        return tuple(score for score in self.scores if score.goal != "report")

    @property
    def losses(self) -> tuple[float, ...]:
        """The objectives' values, turned so that smaller is better."""
        return tuple(score.loss for score in self.objectives)

    @property
    def pruned(self) -> bool:
        """Some score is only a bound."""
        return any(score.bound for score in self.scores)

    def metrics(self) -> dict[str, float]:
        """Flat values for Tune: `kl-divergence`, `kl-divergence/low`, `kl-divergence/high`."""
        flat: dict[str, float] = {}
        for score in self.scores:
            flat[score.name] = score.value
            flat[f"{score.name}/low"], flat[f"{score.name}/high"] = score.low, score.high
        return flat

    def to_list(self) -> list[dict[str, Any]]:
        """As plain JSON values."""
        return [score.to_dict() for score in self.scores]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> "Scorecard":
        """The inverse of `to_list`; lists of before there were bounds hold none."""
        return cls(tuple(Score(**value) for value in values))


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate (Wilson 1927); 0 of 20 gives 0 to 0.161.

    Raises:
        ValueError: `total` is 0, or `hits` is not between 0 and `total`.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"no rate of {hits} in {total}")
    rate, z2 = hits / total, Z_95**2
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by the percentile bootstrap (2,000 draws, fixed seed)."""
    import numpy

    array = numpy.asarray(values, dtype=numpy.float64)
    mean = float(array.mean())
    draws = numpy.random.default_rng(0).integers(0, len(array), size=(2000, len(array)))
    low, high = numpy.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return mean, min(float(low), mean), max(float(high), mean)
