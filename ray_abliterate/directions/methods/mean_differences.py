"""Differences of centres: of means, and of medians that outliers don't move far."""

import hashlib
import logging

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
    needs,
)

log = logging.getLogger(__name__)

ROUNDS = 1000
"""Weiszfeld's rounds at most; a few dozen are usual."""
STILL = 1e-12
"""A round that moves the median by less than this share of the spread is the last."""


@needs("means")
def mean_difference(behaviour: Means, neutral: Means) -> StreamVector:
    """Mean of the behaviour's residuals minus mean of the neutral ones.

    Arditi et al. 2024, arXiv 2406.11717, section 2.3.
    """
    return behaviour.mean - neutral.mean


@needs("variances")
def variance_scaled(
    behaviour: Variances, neutral: Variances, power: float = 1.0, floor: float = 1e-3
) -> StreamVector:
    """The difference of means, each unit of it divided by how much that unit varies by itself.

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
    """Difference of the medians, each unit by itself.

    Half of the prompts can be anything. Yin et al. 2018, arXiv 1803.01498.
    """
    return _median(behaviour.values) - _median(neutral.values)


@needs("residuals")
def geometric_median(behaviour: Sample, neutral: Sample) -> StreamVector:
    """Difference of the points that are nearest to all residuals of a set, in sum.

    Half of the prompts can be anything. Weiszfeld 1937, Tôhoku Mathematical Journal 43; distances
    are smoothed as in Pillutla et al. 2022, arXiv 1912.13445.
    """
    return _nearest(behaviour.values.double()) - _nearest(neutral.values.double())


@needs("residuals")
def median_of_means(behaviour: Sample, neutral: Sample, blocks: int = 21) -> StreamVector:
    """Difference of geometric medians of the means of blocks of prompts.

    Nearly the mean where there are no outliers; fewer of them than half the blocks do little.
    Minsker 2015, Bernoulli 21(4). A prompt's block follows from its residual's bits, so it does not
    matter in which order prompts come.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        blocks: How many; each prompt is one if there are fewer prompts.

    Raises:
        ValueError: there are no blocks.
    """
    if blocks < 1:
        raise ValueError(f"blocks = {blocks} must be 1 or more")
    return _nearest(_block_means(behaviour.values, blocks)) - _nearest(
        _block_means(neutral.values, blocks)
    )


def _median(values: Float[Tensor, "prompt hidden"]) -> StreamVector:
    return torch.from_numpy(numpy.median(values.double().numpy(), axis=0))


def _nearest(points: Float[Tensor, "prompt hidden"]) -> StreamVector:
    """The geometric median, from the element-wise one on."""
    centre: StreamVector = _median(points)
    spread = (points - centre).norm(dim=-1).median()
    if spread == 0:  # at least half of the points are the same one
        return centre
    for _ in range(ROUNDS):
        distances = ((points - centre).square().sum(dim=-1) + (1e-6 * spread) ** 2).sqrt()
        weights = 1 / distances
        moved = (weights / weights.sum()) @ points
        step = (moved - centre).norm()
        centre = moved
        if step <= STILL * spread:
            return centre
    log.warning("the geometric median still moves by %.1e of the spread", float(step / spread))
    return centre


def _block_means(
    values: Float[Tensor, "prompt hidden"], blocks: int
) -> Float[Tensor, "block hidden"]:
    rows = values.numpy()
    order = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(rows[i].tobytes()).digest())
    shuffled, blocks = values.double()[order], min(blocks, len(values))
    return torch.stack([shuffled[number::blocks].mean(dim=0) for number in range(blocks)])
