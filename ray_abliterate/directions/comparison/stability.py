"""Whether there are enough prompts: how alike directions are that share no prompt.

Samples are drawn without replacement and in pairs that have no prompt in common. Bootstrap samples,
drawn with replacement from the same prompts, would agree with each other about those prompts' own
noise: where there is nothing to find at all and units are many, their cosine is 0.5 instead of 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from ray_abliterate.directions.comparison.fitting import ContrastSets, PromptSample
from ray_abliterate.directions.comparison.held_out import shuffle_prompts
from ray_abliterate.recipe import DirectionSettings

SMALLEST = 8
"""Prompts of the smallest samples."""


@dataclass(frozen=True)
class Stability:
    """Cosines of pairs of directions, each found from so many prompts of each set.

    Attributes:
        prompts: Of each set, in each sample.
        cosines: One a pair; pairs without two directions are left out.
    """

    prompts: int
    cosines: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the pairs; not a number without any."""
        return float(numpy.mean(self.cosines)) if self.cosines else math.nan

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest."""
        return (min(self.cosines), max(self.cosines)) if self.cosines else (math.nan, math.nan)


def sample_sizes(counts: tuple[int, int]) -> tuple[int, ...]:
    """Sizes of samples: powers of two, and half of the smaller set; two samples are disjoint."""
    half = min(counts) // 2
    powers = [SMALLEST << n for n in range(30) if SMALLEST << n < half]
    return (*powers, half) if half else ()


def measure_stability(
    sets: ContrastSets, settings: DirectionSettings, pairs: int = 8, seed: int = 0
) -> tuple[Stability, ...]:
    """How alike directions of samples of growing size are.

    Args:
        sets: The residuals.
        settings: The method.
        pairs: How many pairs of samples of each size.
        seed: Decides the samples.
    """
    found = []
    for size in sample_sizes(sets.counts):
        cosines = []
        for one, other in _pairs(sets.counts, size, pairs, seed):
            vectors = [sets.fit(settings, choice).vector for choice in (one, other)]
            if vectors[0] is not None and vectors[1] is not None:
                cosines.append(float(vectors[0] @ vectors[1]))
        found.append(Stability(size, tuple(cosines)))
    return tuple(found)


def _pairs(
    counts: tuple[int, int], size: int, pairs: int, seed: int
) -> Iterator[tuple[PromptSample, PromptSample]]:
    random = numpy.random.default_rng([seed, size])
    for _ in range(pairs):
        one, other = shuffle_prompts(counts, random)
        yield (
            PromptSample(one[:size], other[:size]),
            PromptSample(one[size : 2 * size], other[size : 2 * size]),
        )


def spearman_brown(cosine: float, times: float) -> float:
    """Cosine of two directions found from so many times as many prompts.

    Spearman 1910 and Brown 1910, British Journal of Psychology 3: where a direction is a truth plus
    noise that averages out, 1/cosine - 1 falls as 1/prompts. At or below 0 there is nothing to
    extrapolate, and the cosine stays.
    """
    return cosine if cosine <= 0 else times * cosine / (1 + (times - 1) * cosine)


def reliability(points: tuple[Stability, ...], prompts: int) -> float:
    """Cosine of the direction of so many prompts with that of infinitely many, about.

    Two directions of n prompts each differ twice as much from each other as from the truth, so it
    is the root of their cosine, which is extrapolated from the largest samples.
    """
    last = points[-1] if points else None
    if last is None or not last.cosines:
        return math.nan
    return math.sqrt(max(0.0, spearman_brown(last.mean, prompts / last.prompts)))


def prompts_needed(points: tuple[Stability, ...], wanted: float) -> int | None:
    """Prompts of each set for which `reliability` is what is wanted; None if that can't be told."""
    last = points[-1] if points else None
    if last is None or not last.cosines or last.mean <= 0:
        return None
    if last.mean >= 1:
        return last.prompts
    square = wanted * wanted
    return math.ceil(last.prompts * square * (1 - last.mean) / (last.mean * (1 - square)))
