"""Fits a method's direction to some prompts of one layer, as is repeated on halves and samples."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_abliterate.directions.compute import directions_from_layers
from ray_abliterate.directions.directions import VANISHING
from ray_abliterate.directions.methods.inputs import Layer, Sample, demand_of
from ray_abliterate.directions.methods.recipe_methods import weighted_methods
from ray_abliterate.recipe import DirectionSettings

AxisVector = Float[Tensor, " axis"]
PromptIndices = Int[numpy.ndarray, " chosen"]


class PromptSample(NamedTuple):
    """Indices of some prompts of both sets."""

    behaviour: PromptIndices
    neutral: PromptIndices


@dataclass(frozen=True)
class FittedDirection:
    """The direction that a method fits to some prompts, if it has one.

    Attributes:
        vector: Of unit length, float64, in coordinates of the axes that it was fitted in.
        problem: Why there is none; empty if there is one.
    """

    vector: AxisVector | None = None
    problem: str = ""


def drop_warning(_text: str) -> None:
    """Drop a warning: each would be about layer 0, or about one fit of a thousand."""


@dataclass(frozen=True)
class FitAxes:
    """Both sets in coordinates along some axes of the residual stream.

    Attributes:
        behaviour: Prompts that show the behaviour, float64.
        neutral: Prompts that don't, float64.
        width: Units of the residual stream, which may be more than the axes.
    """

    behaviour: Float[Tensor, "prompt axis"]
    neutral: Float[Tensor, "other axis"]
    width: int

    def layer(self, sample: PromptSample | None = None) -> Layer:
        """Return what a method is given of some prompts, or of all if there is no sample."""
        sets = self.behaviour, self.neutral
        if sample is not None:
            sets = self.behaviour[sample.behaviour], self.neutral[sample.neutral]
        return Layer(*(Sample(values, self.width, drop_warning) for values in sets))


@dataclass(frozen=True)
class ContrastSets:
    """Residuals of both sets after one block, winsorised, to which methods are fitted.

    Where prompts are fewer than units, an equivariant method is fitted in the residuals' span,
    which is computed once, instead of in all units.
    """

    behaviour: Float[Tensor, "prompt hidden"]
    neutral: Float[Tensor, "other hidden"]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of prompts of each set."""
        return len(self.behaviour), len(self.neutral)

    @cached_property
    def means_differ(self) -> bool:
        """Whether the sets' means differ by more than rounding, relative to their length."""
        one, other = self.behaviour.double().mean(dim=0), self.neutral.double().mean(dim=0)
        return float((one - other).norm()) > VANISHING * float(
            torch.maximum(one.norm(), other.norm())
        )

    @cached_property
    def all_units(self) -> FitAxes:
        """Both sets along the units of the residual stream."""
        width = self.behaviour.shape[1]
        return FitAxes(self.behaviour.double(), self.neutral.double(), width)

    @cached_property
    def _in_span(self) -> tuple[FitAxes, Float[Tensor, "hidden axis"]]:
        width = self.behaviour.shape[1]
        one, other, basis = Layer(
            Sample(self.behaviour, width), Sample(self.neutral, width)
        ).in_span
        return FitAxes(one.values, other.values, width), basis

    def axes(self, settings: DirectionSettings) -> tuple[FitAxes, Any]:
        """Return what the recipe's methods are fitted to.

        Returns:
            The sets, and the axes as columns, `"hidden axis"`; None if these are the units.
        """
        methods = weighted_methods(settings)
        equivariant = all(demand_of(method.function).equivariant for method in methods)
        if equivariant and sum(self.counts) < self.behaviour.shape[1]:
            return self._in_span
        return self.all_units, None

    def fit(
        self, settings: DirectionSettings, sample: PromptSample | None = None
    ) -> FittedDirection:
        """Fit the recipe's method to some of the prompts, or all, in coordinates of `axes`."""
        axes, _ = self.axes(settings)
        try:
            layers = [axes.layer(sample)]
            directions = directions_from_layers(layers, settings, {}, drop_warning)
        except ValueError as error:
            return FittedDirection(problem=str(error).partition("\n")[0])
        return FittedDirection(directions.vectors[0].double())
