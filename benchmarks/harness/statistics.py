"""Spreads, ratios and agreements of paired measurements. Arithmetic on plain numbers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KL_RELATIVE, KL_ABSOLUTE = 1e-3, 2e-5
"""Two programs measure the same KL divergence if they differ by less than this share of it plus
this many nats: both print four decimals, and float32 rounding over a vocabulary is the rest."""


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the smallest value, the median and the largest, rounded."""
    middle = statistics.median(values)
    return {
        "min": round(min(values), digits),
        "median": round(middle, digits),
        "max": round(max(values), digits),
    }


def paired_differences(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """Return the spread of differences to a baseline at the same seeds.

    Args:
        values: What was measured, by seed.
        base: The same of the baseline; seeds that are not in both are left out.

    Returns:
        The spread of `values - base`, at how many seeds it is positive (`more`) and negative
        (`less`), and the number of seeds; empty if the two share no seed.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not differences:
        return {}
    return {
        **spread(differences, 2),
        "more": sum(difference > 0 for difference in differences),
        "less": sum(difference < 0 for difference in differences),
        "seeds": len(differences),
    }


def time_ratio(
    ours: Sequence[float], peer: Sequence[float], trials_per_pass: int
) -> dict[str, Any]:
    """Return seconds per trial of two programs, and how many times longer the peer takes.

    Args:
        ours: Seconds of our passes, in order.
        peer: Seconds of the peer's trials at the same points, in order.
        trials_per_pass: Trials in each of our passes.

    Returns:
        `ratio` is of the medians; `paired` is the spread of the ratios pass by pass, each against
        the mean of the peer's trials at the same points.

    Raises:
        ValueError: The two do not cover the same points.
    """
    if len(ours) * trials_per_pass != len(peer):
        raise ValueError(f"{len(ours)} passes of {trials_per_pass} are not {len(peer)} trials")
    per_trial = [seconds / trials_per_pass for seconds in ours]
    groups = [peer[i : i + trials_per_pass] for i in range(0, len(peer), trials_per_pass)]
    ratios = [statistics.mean(g) / s for g, s in zip(groups, per_trial, strict=True)]
    return {
        "ours_seconds": spread(per_trial),
        "peer_seconds": spread(peer),
        "ratio": round(statistics.median(peer) / statistics.median(per_trial), 2),
        "paired": spread(ratios, 2),
        "ours_passes": [round(seconds, 4) for seconds in ours],
    }


def equal_verdicts(ours: Iterable[str], peer: Iterable[str]) -> dict[str, int]:
    """Count the verdicts that two programs agree on, and all verdicts.

    Args:
        ours: Each trial's verdicts, a digit per prompt.
        peer: The same of the peer, for the same trials and prompts.
    """
    pairs = [(a, b) for x, y in zip(ours, peer, strict=True) for a, b in zip(x, y, strict=True)]
    return {"equal": sum(a == b for a, b in pairs), "verdicts": len(pairs)}


def same_kl(ours: float, peer: float) -> bool:
    """Return whether two KL divergences, in nats, are the same quantity but for rounding."""
    return abs(ours - peer) <= KL_RELATIVE * max(ours, peer) + KL_ABSOLUTE
