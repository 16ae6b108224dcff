"""Spreads, ratios and agreements of paired measurements. Arithmetic on plain numbers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KL_RELATIVE, KL_ABSOLUTE = 1e-3, 2e-5
"""Two programs measure the same KL divergence if they differ by less than this share of it plus
this many nats: both print four decimals, and float32 rounding over a vocabulary is the rest."""
NOT_MEASURED = "not measured"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Smallest, median and largest."""
    middle = statistics.median(values)
    return {
        "min": round(min(values), digits),
        "median": round(middle, digits),
        "max": round(max(values), digits),
    }


def compare(ours: Sequence[float], peer: Sequence[float], trials_per_pass: int) -> dict[str, Any]:
    """Seconds per trial of both, and how many times longer the peer takes.

    Args:
        ours: Seconds of our passes, in order.
        peer: Seconds of the peer's trials at the same points, in order.
        trials_per_pass: Trials in each of our passes.

    Returns:
        `ratio` is of the medians; `paired` is the spread of the ratios pass by pass, each against
        the mean of the peer's trials at the same points.

    Raises:
        ValueError: the two do not cover the same points.
    """
    if len(ours) * trials_per_pass != len(peer):
        raise ValueError(f"{len(ours)} passes of {trials_per_pass} are not {len(peer)} trials")
    each = [seconds / trials_per_pass for seconds in ours]
    groups = [peer[i : i + trials_per_pass] for i in range(0, len(peer), trials_per_pass)]
    paired = [statistics.mean(g) / s for g, s in zip(groups, each, strict=True)]
    return {
        "ours_seconds": spread(each),
        "peer_seconds": spread(peer),
        "ratio": round(statistics.median(peer) / statistics.median(each), 2),
        "paired": spread(paired, 2),
        "ours_passes": [round(seconds, 4) for seconds in ours],
    }


def agreement(ours: Iterable[str], peer: Iterable[str]) -> dict[str, int]:
    """Verdicts that are equal, and verdicts in all; each trial's are a digit a prompt."""
    pairs = [(a, b) for x, y in zip(ours, peer, strict=True) for a, b in zip(x, y, strict=True)]
    return {"equal": sum(a == b for a, b in pairs), "verdicts": len(pairs)}


def same_kl(ours: float, peer: float) -> bool:
    """Whether two KL divergences, in nats, are the same quantity but for rounding."""
    return abs(ours - peer) <= KL_RELATIVE * max(ours, peer) + KL_ABSOLUTE


def best(configuration: Mapping[str, Any]) -> float | None:
    """The largest ratio of a configuration over its numbers of trials per pass."""
    ratios = [found["ratio"] for found in configuration["per_pass"].values()]
    return max(ratios, default=None)


def verdict_lines(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The three lines a run ends with: best ratio by dtype and model; float32's smaller one."""
    found = {(c["model"], c["dtype"]): best(c) for c in configurations}
    single = [r for (_, dtype), r in found.items() if dtype == "float32" and r is not None]
    named = {
        "bf16 answers": found.get(("answers", "bfloat16")),
        "bf16 declines": found.get(("declines", "bfloat16")),
        "fp32": min(single, default=None),
    }
    return [f"ratio {n}: {NOT_MEASURED if r is None else f'{r:.2f}'}" for n, r in named.items()]
