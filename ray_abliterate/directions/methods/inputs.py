"""What a direction method is given: each prompt set after one block, as much of it as it needs.

A method declares what it needs and is given no more: so means are summed where the residuals lie,
and residuals themselves, where a method needs them, are fetched one layer at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.residuals.moments import Moments

log = logging.getLogger(__name__)

StreamVector = Float[Tensor, " hidden"]
StreamVectors = Float[Tensor, "rank hidden"]
Need = Literal["means", "variances", "covariances", "residuals"]
Warn = Callable[[str], None]
"""Receives a warning, as `logging.Logger.warning` does."""
TINY = 1e-300
"""Smaller than any length, but not zero."""
NEEDS: tuple[Need, ...] = ("means", "variances", "covariances", "residuals")
"""From least to most; each includes all before it."""


@runtime_checkable
class Means(Protocol):
    """The size and the mean of a set."""

    @property
    def count(self) -> int:
        """The number of prompts in the set."""

    @property
    def mean(self) -> StreamVector:
        """The mean over prompts, float64."""


@runtime_checkable
class Variances(Means, Protocol):
    """`Means`, and how much each unit varies."""

    @property
    def variance(self) -> StreamVector:
        """The variance of each unit over prompts (over n), float64."""


@runtime_checkable
class Covariances(Variances, Protocol):
    """`Variances`, and how units vary together."""

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """The covariance over prompts (over n), float64."""

    @property
    def width(self) -> int:
        """The units of the residual stream; `mean` has fewer if it lies in the residuals' span."""


@dataclass(frozen=True)
class Average:
    """A mean and nothing else, which satisfies `Means`."""

    count: int
    mean: StreamVector


@dataclass(frozen=True)
class Summary:
    """Moments, which satisfy `Variances`, and `Covariances` if they are of pairs of units."""

    moments: Moments

    @property
    def count(self) -> int:
        """The number of prompts in the set."""
        return self.moments.count

    @property
    def mean(self) -> StreamVector:
        """The mean over prompts, float64."""
        return torch.from_numpy(self.moments.mean)

    @property
    def variance(self) -> StreamVector:
        """The variance of each unit over prompts (over n)."""
        return torch.from_numpy(numpy.ascontiguousarray(self.moments.variance))

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """The covariance of the units over prompts (over n)."""
        return torch.from_numpy(self.moments.covariance)

    @property
    def width(self) -> int:
        """The units of the residual stream."""
        return len(self.moments.mean)


@dataclass(frozen=True)
class Sample:
    """All residuals of one set after one block, which satisfy `Covariances` too.

    Attributes:
        values: float32 or float64 on the CPU, `"prompt hidden"`, prompts in the order of their set.
        width: Units of the residual stream.
        warn: Receives what a method has to report about these residuals.
    """

    values: Float[Tensor, "prompt hidden"]
    width: int
    warn: Warn = field(default=log.warning, compare=False)

    @property
    def count(self) -> int:
        """The number of prompts in the set."""
        return len(self.values)

    @cached_property
    def mean(self) -> StreamVector:
        """The mean over prompts, float64."""
        return self.values.double().mean(dim=0)

    @property
    def variance(self) -> StreamVector:
        """The variance of each unit over prompts (over n)."""
        return self.values.double().var(dim=0, unbiased=False)

    @cached_property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """The covariance of the units over prompts (over n)."""
        return Summary(Moments.of(self.values.numpy(), pairs=True)).covariance


@dataclass(frozen=True)
class Demand:
    """What a method asks for.

    Attributes:
        need: What it reads.
        equivariant: Whether rotating the residuals rotates what it finds, and it finds nothing
            outside their span. Where prompts are fewer than units, such a method is given
            coordinates in that span.
    """

    need: Need = "residuals"
    equivariant: bool = False


Function = TypeVar("Function", bound=Callable[..., Any])


def needs(need: Need, equivariant: bool = False) -> Callable[[Function], Function]:
    """Declare what a method reads; without this decorator it gets all residuals as they are.

    Args:
        need: One of `NEEDS`.
        equivariant: See `Demand`.

    Raises:
        ValueError: there is no such need.
    """
    if need not in NEEDS:
        raise ValueError(f"a method can need {', '.join(NEEDS)}; not {need!r}")

    def declare(function: Function) -> Function:
        function.demand = Demand(need, equivariant)  # type: ignore[attr-defined]
        return function

    return declare


def demand_of(function: Callable[..., Any]) -> Demand:
    """Return what a method asks for; a `functools.partial` of it asks for the same."""
    while isinstance(function, partial) and not hasattr(function, "demand"):
        function = function.func
    demand: Demand = getattr(function, "demand", Demand())
    return demand


@dataclass(frozen=True)
class Layer:
    """Both sets after one block, each as much as the methods need."""

    behaviour: Any
    neutral: Any

    @cached_property
    def in_span(self) -> tuple[Sample, Sample, Float[Tensor, "hidden span"]]:
        """Both sets in coordinates of an orthonormal basis of their span, and the basis."""
        sets = self.behaviour.values.double(), self.neutral.values.double()
        basis = torch.linalg.qr(torch.cat(sets).T).Q  # (hidden, prompts of both sets)
        width, warn = self.behaviour.width, self.behaviour.warn
        one, other = (Sample(values @ basis, width, warn) for values in sets)
        return one, other, basis

    def find(self, function: Callable[..., Any], **options: Any) -> StreamVectors:
        """Return the raw vectors that a method finds at this layer, float64.

        Args:
            function: The method.
            options: Its keyword arguments.

        Raises:
            ValueError: the method did not return one finite vector or several; names it.
        """
        are_samples = isinstance(self.behaviour, Sample) and isinstance(self.neutral, Sample)
        fewer = are_samples and self.behaviour.count + self.neutral.count < self.behaviour.width
        if demand_of(function).equivariant and fewer:  # prompts than units
            behaviour, neutral, basis = self.in_span
            rows: StreamVectors = function(behaviour, neutral, **options).double()
            rows = rows @ basis.T  # (rank, hidden)
        else:
            rows = function(self.behaviour, self.neutral, **options).double()
        rows = rows if rows.ndim == 2 else rows[None]
        width = len(self.neutral.mean)
        if rows.ndim != 2 or rows.shape[1] != width or not torch.isfinite(rows).all():
            raise ValueError(
                f"{getattr(function, '__name__', function)} returned {tuple(rows.shape)}"
                f"{'' if torch.isfinite(rows).all() else ' with values that are not finite'}; "
                f"it should return a vector of {width} finite numbers, or rows of them"
            )
        return rows
