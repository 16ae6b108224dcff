"""What a direction method sees: one prompt set after one block, as much of it as it asked for.

A method says what it needs, and is handed no more: so that means are added up where residuals lie,
and residuals themselves, where a method wants them, are fetched one layer at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.residuals.moments import Moments

StreamVector = Float[Tensor, " hidden"]
StreamVectors = Float[Tensor, "rank hidden"]
Need = Literal["means", "variances", "covariances", "residuals"]
TINY = 1e-300
"""Below any length, and no zero."""
NEEDS: tuple[Need, ...] = ("means", "variances", "covariances", "residuals")
"""From least to most; what has more has all that comes before it."""


@runtime_checkable
class Means(Protocol):
    """A set's size and mean."""

    @property
    def count(self) -> int:
        """Number of prompts."""

    @property
    def mean(self) -> StreamVector:
        """Mean over prompts, float64."""


@runtime_checkable
class Variances(Means, Protocol):
    """That, and how much each unit varies."""

    @property
    def variance(self) -> StreamVector:
        """Variance of each unit over prompts (over n), float64."""


@runtime_checkable
class Covariances(Variances, Protocol):
    """That, and how units vary together."""

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Covariance over prompts (over n), float64."""

    @property
    def width(self) -> int:
        """Units of the residual stream; `mean` has fewer where it is in the residuals' span."""


@dataclass(frozen=True)
class Average:
    """A mean and nothing else: `Means`."""

    count: int
    mean: StreamVector


@dataclass(frozen=True)
class Summary:
    """Moments as a method sees them: `Variances`, or `Covariances` if they are of pairs."""

    moments: Moments

    @property
    def count(self) -> int:
        """Number of prompts."""
        return self.moments.count

    @property
    def mean(self) -> StreamVector:
        """Mean over prompts, float64."""
        return torch.from_numpy(self.moments.mean)

    @property
    def variance(self) -> StreamVector:
        """Variance of each unit."""
        return torch.from_numpy(numpy.ascontiguousarray(self.moments.variance))

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Covariance of the units."""
        return torch.from_numpy(self.moments.covariance)

    @property
    def width(self) -> int:
        """Units of the residual stream."""
        return len(self.moments.mean)


@dataclass(frozen=True)
class Sample:
    """All residuals of one set after one block, and so everything else: `Covariances`, too.

    Attributes:
        values: float32 or float64 on the CPU, `"prompt hidden"`, prompts in the order of their set.
        width: Units of the residual stream.
    """

    values: Float[Tensor, "prompt hidden"]
    width: int

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.values)

    @cached_property
    def mean(self) -> StreamVector:
        """Mean over prompts, float64."""
        return self.values.double().mean(dim=0)

    @property
    def variance(self) -> StreamVector:
        """Variance of each unit."""
        return self.values.double().var(dim=0, unbiased=False)

    @cached_property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Covariance of the units."""
        return Summary(Moments.of(self.values.numpy(), pairs=True)).covariance


@dataclass(frozen=True)
class Demand:
    """What a method asks for.

    Attributes:
        need: What it reads.
        turns: Turning the residuals turns what it finds, and it finds nothing outside their span;
            so where prompts are fewer than units it may be handed coordinates in that span.
    """

    need: Need = "residuals"
    turns: bool = False


Function = TypeVar("Function", bound=Callable[..., Any])


def needs(need: Need, turns: bool = False) -> Callable[[Function], Function]:
    """Say what a method reads; see `Demand`. One that says nothing gets all residuals as they are.

    Raises:
        ValueError: there is no such need.
    """
    if need not in NEEDS:
        raise ValueError(f"a method can need {', '.join(NEEDS)}; not {need!r}")

    def said(function: Function) -> Function:
        function.demand = Demand(need, turns)  # type: ignore[attr-defined]
        return function

    return said


def demand_of(function: Callable[..., Any]) -> Demand:
    """What a method asks for; one with some of its options filled in asks for the same."""
    while isinstance(function, partial) and not hasattr(function, "demand"):
        function = function.func
    found: Demand = getattr(function, "demand", Demand())
    return found


@dataclass(frozen=True)
class Layer:
    """Both sets after one block."""

    behaviour: Any
    neutral: Any

    @cached_property
    def spanned(self) -> tuple[Sample, Sample, Float[Tensor, "hidden span"]]:
        """Both as coordinates in an orthonormal basis of their residuals' span, and the basis."""
        sets = self.behaviour.values.double(), self.neutral.values.double()
        basis = torch.linalg.qr(torch.cat(sets).T).Q
        width = self.behaviour.width
        one, other = (Sample(values @ basis, width) for values in sets)
        return one, other, basis

    def find(self, function: Callable[..., Any], **options: Any) -> StreamVectors:
        """What a method finds here, as rows, float64.

        Raises:
            ValueError: it did not give one vector or several; names the method.
        """
        both = isinstance(self.behaviour, Sample) and isinstance(self.neutral, Sample)
        fewer = both and self.behaviour.count + self.neutral.count < self.behaviour.width
        if demand_of(function).turns and fewer:
            behaviour, neutral, basis = self.spanned
            rows: StreamVectors = function(behaviour, neutral, **options).double()
            rows = rows @ basis.T
        else:
            rows = function(self.behaviour, self.neutral, **options).double()
        rows = rows if rows.ndim == 2 else rows[None]
        width = len(self.neutral.mean)
        if rows.ndim != 2 or rows.shape[1] != width or not torch.isfinite(rows).all():
            raise ValueError(
                f"{getattr(function, '__name__', function)} gave {tuple(rows.shape)}"
                f"{'' if torch.isfinite(rows).all() else ' with values that are not finite'}; "
                f"it should give a vector of {width} finite numbers, or rows of them"
            )
        return rows
