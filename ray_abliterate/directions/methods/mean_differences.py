"""Differences of centres: of means, and of medians, which outliers hardly move."""

import hashlib

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.methods.inputs import (
    TINY,
    Means,
    Sample,
    StreamVector,
    Variances,
    Warn,
    needs,
)

ROUNDS = 1000
"""Most rounds of Weiszfeld's algorithm; a few dozen are usual."""
STILL = 1e-12
"""The last round is one that moves the median by less than this share of the spread."""


@needs("means")
def mean_difference(behaviour: Means, neutral: Means) -> StreamVector:
    """Return the mean of the behaviour's residuals minus the mean of the neutral ones.

    Arditi et al. 2024, arXiv 2406.11717, section 2.3.
    """
    return behaviour.mean - neutral.mean


@needs("variances")
def variance_scaled(
    behaviour: Variances, neutral: Variances, power: float = 1.0, floor: float = 1e-3
) -> StreamVector:
    """Return the difference of means, each unit of it divided by how much that unit varies.

    With power 2 the independence rule, diagonal LDA: Bickel and Levina 2004, Bernoulli 10(6).

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        power: 1 divides by the standard deviation within the sets, 2 by the variance.
        floor: Added to each variance, as a share of the mean one, so that a unit that hardly
            varies does not decide.
    """
    within = 0.5 * (behaviour.variance + neutral.variance)
    within = within + floor * within.mean()
    difference = behaviour.mean - neutral.mean
    if not within.any():
        return difference
    scaled: StreamVector = difference / within.clamp_min(TINY) ** (0.5 * power)
    scaled *= difference.norm() / scaled.norm().clamp_min(TINY)
    return scaled


@needs("residuals")
def median_difference(behaviour: Sample, neutral: Sample) -> StreamVector:
    """Return the difference of the medians, unit by unit.

    Up to half of the prompts can be outliers. Yin et al. 2018, arXiv 1803.01498.
    """
    return _median(behaviour.values) - _median(neutral.values)


@needs("residuals")
def geometric_median(behaviour: Sample, neutral: Sample) -> StreamVector:
    """Return the difference of the points with the least summed distance to a set's residuals.

    Up to half of the prompts can be outliers. Weiszfeld 1937, Tôhoku Mathematical Journal 43;
    distances are smoothed as in Pillutla et al. 2022, arXiv 1912.13445.
    """
    return _geometric_median(behaviour.values.double(), behaviour.warn) - _geometric_median(
        neutral.values.double(), neutral.warn
    )


@needs("residuals")
def median_of_means(behaviour: Sample, neutral: Sample, blocks: int = 21) -> StreamVector:
    """Return the difference of geometric medians of the means of blocks of prompts.

    Nearly the mean where there are no outliers; fewer outliers than half the blocks do little.
    Minsker 2015, Bernoulli 21(4). A prompt's block follows from its residual's bits, so the order
    of the prompts does not matter.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        blocks: The number of blocks; each prompt is one if there are fewer prompts.

    Raises:
        ValueError: there are no blocks.
    """
    if blocks < 1:
        raise ValueError(f"blocks = {blocks} must be 1 or more")
    return _geometric_median(
        _block_means(behaviour.values, blocks), behaviour.warn
    ) - _geometric_median(_block_means(neutral.values, blocks), neutral.warn)


def _median(values: Float[Tensor, "prompt hidden"]) -> StreamVector:
    return torch.from_numpy(numpy.median(values.double().numpy(), axis=0))


def _geometric_median(points: Float[Tensor, "prompt hidden"], warn: Warn) -> StreamVector:
    """Return the geometric median, by Weiszfeld's algorithm from the element-wise median on."""
    centre: StreamVector = _median(points)
    spread = (points - centre).norm(dim=-1).median()
    if spread == 0:  # at least half of the points are equal
        return centre
    for _ in range(ROUNDS):
        # smoothed, so that a point at the centre has a finite weight: (prompt)
        distances = ((points - centre).square().sum(dim=-1) + (1e-6 * spread) ** 2).sqrt()
        weights = 1 / distances
        moved = (weights / weights.sum()) @ points
        step = (moved - centre).norm()
        centre = moved
        if step <= STILL * spread:
            return centre
    warn(f"the geometric median still moves by {float(step / spread):.1e} of the spread")
    return centre


def _block_means(
    values: Float[Tensor, "prompt hidden"], blocks: int
) -> Float[Tensor, "block hidden"]:
    rows = values.numpy()
    # by hash: an order that depends on no other prompt, and on no place
    order = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(rows[i].tobytes()).digest())
    shuffled, blocks = values.double()[order], min(blocks, len(values))
    return torch.stack([shuffled[number::blocks].mean(dim=0) for number in range(blocks)])
