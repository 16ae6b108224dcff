"""Whether there are enough prompts: how similar directions are that share no prompt.

Samples are drawn without replacement, in pairs that have no prompt in common. Bootstrap samples,
drawn with replacement from the same prompts, would agree about those prompts' own noise: where
there is nothing to find and units are many, their cosine is 0.5 instead of 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from ray_abliterate.directions.comparison.fitting import ContrastSets, PromptSample
from ray_abliterate.directions.comparison.held_out import shuffle_prompts
from ray_abliterate.recipe import DirectionSettings

SMALLEST = 8
"""Prompts of each set in the smallest samples."""


@dataclass(frozen=True)
class Stability:
    """Cosines of pairs of directions from samples of one size.

    Attributes:
        prompts: Prompts of each set in each sample.
        cosines: One for each pair; pairs without two directions are left out.
    """

    prompts: int
    cosines: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the pairs; not a number if there are none."""
        return float(numpy.mean(self.cosines)) if self.cosines else math.nan

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest cosine; not numbers if there are none."""
        return (min(self.cosines), max(self.cosines)) if self.cosines else (math.nan, math.nan)


def sample_sizes(counts: tuple[int, int]) -> tuple[int, ...]:
    """Return sample sizes: powers of two, and half of the smaller set, so that pairs fit in it."""
    half = min(counts) // 2
    powers = [SMALLEST << n for n in range(30) if SMALLEST << n < half]
    return (*powers, half) if half else ()


def measure_stability(
    sets: ContrastSets, settings: DirectionSettings, pairs: int = 8, seed: int = 0
) -> tuple[Stability, ...]:
    """Measure how similar the directions of samples are, for samples of growing size.

    Args:
        sets: The residuals.
        settings: The method.
        pairs: Pairs of samples of each size.
        seed: Decides the samples.
    """
    points = []
    for size in sample_sizes(sets.counts):
        cosines = []
        for one, other in _disjoint_pairs(sets.counts, size, pairs, seed):
            vectors = [sets.fit(settings, sample).vector for sample in (one, other)]
            if vectors[0] is not None and vectors[1] is not None:
                cosines.append(float(vectors[0] @ vectors[1]))
        points.append(Stability(size, tuple(cosines)))
    return tuple(points)


def _disjoint_pairs(
    counts: tuple[int, int], size: int, pairs: int, seed: int
) -> Iterator[tuple[PromptSample, PromptSample]]:
    random = numpy.random.default_rng([seed, size])  # each size has samples of its own
    for _ in range(pairs):
        one, other = shuffle_prompts(counts, random)
        yield (
            PromptSample(one[:size], other[:size]),
            PromptSample(one[size : 2 * size], other[size : 2 * size]),
        )


def spearman_brown(cosine: float, times: float) -> float:
    """Extrapolate the cosine of two directions to `times` as many prompts.

    Spearman 1910 and Brown 1910, British Journal of Psychology 3: where a direction is a truth plus
    noise that averages out, 1/cosine - 1 falls as 1/prompts. At or below 0 there is nothing to
    extrapolate, and the cosine stays.
    """
    return cosine if cosine <= 0 else times * cosine / (1 + (times - 1) * cosine)


def reliability(points: tuple[Stability, ...], prompts: int) -> float:
    """Estimate the cosine of the direction of `prompts` prompts with that of infinitely many.

    Two directions of n prompts each differ twice as much from each other as from the truth, so it
    is the root of their cosine, which is extrapolated from the largest samples. It is not a number
    where no cosine is known.
    """
    last = points[-1] if points else None
    if last is None or not last.cosines:
        return math.nan
    return math.sqrt(max(0.0, spearman_brown(last.mean, prompts / last.prompts)))


def prompts_needed(points: tuple[Stability, ...], wanted: float) -> int | None:
    """Estimate the prompts of each set for which `reliability` is `wanted`; None if unknown."""
    last = points[-1] if points else None
    if last is None or not last.cosines or last.mean <= 0:
        return None
    if last.mean >= 1:
        return last.prompts
    square = wanted * wanted
    return math.ceil(last.prompts * square * (1 - last.mean) / (last.mean * (1 - square)))
