"""A method's direction from some prompts of one layer: what is repeated on halves and samples."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_abliterate.directions import compute as finding
from ray_abliterate.directions.compute import directions_from_layers, weighted_methods
from ray_abliterate.directions.methods import mean_differences as centres
from ray_abliterate.directions.methods.inputs import Layer, Sample, demand_of
from ray_abliterate.recipe import DirectionSettings

AxisVector = Float[Tensor, " axis"]
PromptIndices = Int[numpy.ndarray, " chosen"]
VANISHING = 1e-6
"""Means that differ by less than this share of their length are the same."""


class PromptSample(NamedTuple):
    """Places of some prompts of both sets."""

    behaviour: PromptIndices
    neutral: PromptIndices


@dataclass(frozen=True)
class FittedDirection:
    """One method's direction.

    Attributes:
        vector: Of unit length, float64, along the axes that it was found in.
        problem: Why there is none.
    """

    vector: AxisVector | None = None
    problem: str = ""


@dataclass(frozen=True)
class FitAxes:
    """Both sets along some axes of the stream, float64; `width` is the stream's own."""

    behaviour: Float[Tensor, "prompt axis"]
    neutral: Float[Tensor, "other axis"]
    width: int

    def layer(self, choice: PromptSample | None = None) -> Layer:
        """What a method sees of some prompts, all of them if none are chosen."""
        sets = self.behaviour, self.neutral
        if choice is not None:
            sets = self.behaviour[choice.behaviour], self.neutral[choice.neutral]
        return Layer(*(Sample(values, self.width) for values in sets))


@dataclass(frozen=True)
class ContrastSets:
    """Residuals of both sets after one block, winsorised; a method fits them as it may.

    Where prompts are fewer than units, a method that turns with the residuals fits them in their
    span, which is worked out once, instead of in all units.
    """

    behaviour: Float[Tensor, "prompt hidden"]
    neutral: Float[Tensor, "other hidden"]

    @property
    def counts(self) -> tuple[int, int]:
        """Prompts of each set."""
        return len(self.behaviour), len(self.neutral)

    @cached_property
    def differ(self) -> bool:
        """Whether the means do."""
        one, other = self.behaviour.double().mean(dim=0), self.neutral.double().mean(dim=0)
        return float((one - other).norm()) > VANISHING * float(
            torch.maximum(one.norm(), other.norm())
        )

    @cached_property
    def whole(self) -> FitAxes:
        """All units."""
        width = self.behaviour.shape[1]
        return FitAxes(self.behaviour.double(), self.neutral.double(), width)

    @cached_property
    def _spanned(self) -> tuple[FitAxes, Float[Tensor, "hidden axis"]]:
        width = self.behaviour.shape[1]
        one, other, basis = Layer(
            Sample(self.behaviour, width), Sample(self.neutral, width)
        ).spanned
        return FitAxes(one.values, other.values, width), basis

    def axes(self, settings: DirectionSettings) -> tuple[FitAxes, Any]:
        """What the recipe's methods fit, and the basis of it (None: the units themselves)."""
        turns = all(demand_of(function).turns for _, _, function, _ in weighted_methods(settings))
        if turns and sum(self.counts) < self.behaviour.shape[1]:
            return self._spanned
        return self.whole, None

    def fit(
        self, settings: DirectionSettings, choice: PromptSample | None = None
    ) -> FittedDirection:
        """The direction of the recipe's method, along `axes`, from some of the prompts."""
        axes, _ = self.axes(settings)
        try:
            with unsaid():
                found = directions_from_layers([axes.layer(choice)], settings, {})
        except ValueError as error:
            return FittedDirection(problem=str(error).partition("\n")[0])
        return FittedDirection(found.vectors[0].double())


_keeping_quiet: ContextVar[bool] = ContextVar("keeping quiet", default=False)
for _module in (finding, centres):
    logging.getLogger(_module.__name__).addFilter(lambda _record: not _keeping_quiet.get())


@contextmanager
def unsaid() -> Iterator[None]:
    """This thread keeps warnings back: each would speak of layer 0, or of one fit of a thousand."""
    token = _keeping_quiet.set(True)
    try:
        yield
    finally:
        _keeping_quiet.reset(token)
