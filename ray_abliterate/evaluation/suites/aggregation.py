"""Aggregates chunks: scores over all of them, and how two models differ on the same items.

Pure values. Nothing depends on the order in which chunks come: they are sorted by id, sums are
rounded once (`math.fsum`), and a chunk that comes twice counts once.
"""

import json
import math
from collections.abc import Iterable, Sequence

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.suites.suite import Measure, PairedDifference, SuiteChunk
from ray_abliterate.search.score import Z_95, Score, mean_interval, wilson

BOOTSTRAP_UP_TO = 1000
"""Most values that are bootstrapped: the mean of more is normal, and 2,000 draws of them are
large."""

ItemValues = dict[tuple[str, int], float]
"""The known values of a measure, by chunk and place in it."""


def merge_chunks(name: str, chunks: Iterable[SuiteChunk]) -> list[SuiteChunk]:
    """Return each chunk once, sorted by id.

    Raises:
        ScoreError: there is no chunk, one is of another suite, or two of the same id are of
            different items.
    """
    merged: dict[str, SuiteChunk] = {}
    for chunk in chunks:
        if chunk.suite != name:
            raise ScoreError(f"a chunk of the suite {chunk.suite!r} is no part of {name!r}")
        known = merged.get(chunk.chunk, chunk)
        if known.fingerprint != chunk.fingerprint:
            raise ScoreError(
                f"{name}, chunk {chunk.chunk}: two results are of different items; the data "
                "changed in between.\n  Measure again, from the beginning."
            )
        # either will do, but it has to be the same one whichever comes first
        merged[chunk.chunk] = min(
            known, chunk, key=lambda c: json.dumps(c.to_dict(), sort_keys=True)
        )
    if not merged:
        raise ScoreError(f"{name}: no chunk has been measured")
    return [merged[key] for key in sorted(merged)]


def summarise(
    name: str, measures: Sequence[Measure], chunks: Iterable[SuiteChunk]
) -> tuple[Score, ...]:
    """Return scores of every measure, over all items and by group.

    The first measure's score has the suite's name, others `suite.measure`; those of a group end in
    `/group`, and the mean over groups of a rate is `suite/macro`. Rates have Wilson's interval,
    means a bootstrap interval up to 1,000 values and the normal one above.

    Args:
        name: Name of the suite.
        measures: Measures of the suite.
        chunks: Its chunks, in any order.

    Raises:
        ScoreError: nothing is known of a measure; or see `merge_chunks`.
    """
    results = merge_chunks(name, chunks)
    groups = sorted({chunk.group for chunk in results})
    scores: list[Score] = []
    for index, measure in enumerate(measures):
        title = name if index == 0 else f"{name}.{measure.name}"
        scores.append(_score(title, measure, results))
        if len(groups) < 2:
            continue
        by_group = {g: [chunk for chunk in results if chunk.group == g] for g in groups}
        measured = {g: chunks for g, chunks in by_group.items() if _values(measure.name, chunks)}
        group_scores = [_score(f"{title}/{g}", measure, chunks) for g, chunks in measured.items()]
        if measure.kind == "rate":
            scores.append(_macro(f"{title}/macro", measure, group_scores))
        scores += group_scores
    return tuple(scores)


def compare_suites(
    measures: Sequence[Measure], base: Iterable[SuiteChunk], other: Iterable[SuiteChunk]
) -> tuple[PairedDifference, ...]:
    """Compare two models on the items that both were asked, measure by measure.

    For rates that is McNemar's exact test, and Newcombe's (1998, method 10) interval of the
    difference of paired proportions; for means a paired bootstrap.

    Args:
        measures: Measures of the suite.
        base: Chunks of the first model, in any order.
        other: Chunks of the second model, in any order.

    Raises:
        ScoreError: they have no item in common, or a chunk of the same id has other items.
    """
    differences = []
    base, other = list(base), list(other)
    name = base[0].suite if base else ""
    base, other = merge_chunks(name, base), merge_chunks(name, other)
    # merging what both were asked refuses chunks of one id with different items
    merge_chunks(name, [_without_values(chunk) for chunk in (*base, *other)])
    for measure in measures:
        first, second = _values(measure.name, base), _values(measure.name, other)
        shared = sorted(first.keys() & second.keys())
        if not shared:
            raise ScoreError(f"{name}: the two models have no item of {measure.name!r} in common")
        pairs = [(first[key], second[key]) for key in shared]
        compare = _paired_rates if measure.kind == "rate" else _paired_means
        differences.append(compare(measure, pairs))
    return tuple(differences)


class AggregatedSuite:
    """A suite whose scores are those of its measures, aggregated over chunks by this module."""

    name: str
    measures: tuple[Measure, ...]

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """Return scores with intervals, whatever the order of the chunks; see `summarise`."""
        return summarise(self.name, self.measures, chunks)

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[PairedDifference, ...]:
        """Return how two models differ on the items that both were asked; see `compare_suites`."""
        return compare_suites(self.measures, base, other)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): are as many lost as gained?

    Args:
        lost: Items that are 1 for the first model only.
        gained: Items that are 1 for the second model only.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def newcombe_interval(both: int, lost: int, gained: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired proportions (Newcombe 1998, method 10).

    The difference is (both + gained)/n − (both + lost)/n, with n the sum of all four counts.
    """
    n = both + lost + gained + neither
    before, after = (both + lost) / n, (both + gained) / n
    low_before, high_before = wilson(both + lost, n)
    low_after, high_after = wilson(both + gained, n)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    excess: float = both * neither - lost * gained
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    phi = excess / math.sqrt(margins) if margins else 0.0

    def margin(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = after - before
    low = difference - margin(after - low_after, high_before - before)
    high = difference + margin(high_after - after, before - low_before)
    return max(-1.0, low), min(1.0, high)


def _without_values(chunk: SuiteChunk) -> SuiteChunk:
    """Return what was asked, without what was measured."""
    return SuiteChunk(chunk.suite, chunk.chunk, chunk.fingerprint, chunk.group, chunk.items)


def _values(measure: str, chunks: Iterable[SuiteChunk]) -> ItemValues:
    return {
        (chunk.chunk, index): value
        for chunk in chunks
        for index, value in enumerate(chunk.values.get(measure, ()))
        if value is not None
    }


def _score(title: str, measure: Measure, chunks: Sequence[SuiteChunk]) -> Score:
    by_item = _values(measure.name, chunks)
    total = sum(len(chunk.items) for chunk in chunks)
    if not by_item:
        raise ScoreError(f"{title}: {measure.name!r} is unknown for all {total} items")
    values = [by_item[key] for key in sorted(by_item)]
    detail: dict[str, float] = {"items": len(values), "unknown": total - len(values)}
    for part in ("counts", "sums"):
        for name in sorted({name for chunk in chunks for name in getattr(chunk, part)}):
            summands: list[float] = [getattr(chunk, part).get(name, 0) for chunk in chunks]
            detail[name] = sum(summands) if part == "counts" else math.fsum(summands)
    if measure.kind == "rate":
        hits = round(math.fsum(values))
        low, high = wilson(hits, len(values))
        value, detail = hits / len(values), {"hits": hits, **detail}
    else:
        value, low, high = _mean(values)
    return Score(title, value, low, high, measure.better, measure.unit, detail)


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a mean, and the ends of its 95 % interval."""
    if len(values) <= BOOTSTRAP_UP_TO:
        _, low, high = mean_interval(values)
    mean = math.fsum(values) / len(values)
    if len(values) > BOOTSTRAP_UP_TO:
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        half = Z_95 * math.sqrt(variance / len(values))
        low, high = mean - half, mean + half
    return mean, min(low, mean), max(high, mean)


def _macro(title: str, measure: Measure, scores: Sequence[Score]) -> Score:
    """Return the mean of the groups' rates, each group counting the same.

    Their Wilson intervals are combined as Zou and Donner (2008) do for sums of independent rates.
    """
    groups = len(scores)
    mean = math.fsum(score.value for score in scores) / groups
    below = math.sqrt(math.fsum((s.value - s.low) ** 2 for s in scores)) / groups
    above = math.sqrt(math.fsum((s.high - s.value) ** 2 for s in scores)) / groups
    low, high = max(0.0, mean - below), min(1.0, mean + above)
    return Score(title, mean, low, high, measure.better, measure.unit, {"groups": groups})


def _paired_rates(measure: Measure, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    both = sum(bool(before and after) for before, after in pairs)
    lost = sum(bool(before and not after) for before, after in pairs)
    gained = sum(bool(after and not before) for before, after in pairs)
    n = len(pairs)
    low, high = newcombe_interval(both, lost, gained, n - both - lost - gained)
    difference = (gained - lost) / n
    return PairedDifference(
        measure.name,
        (both + lost) / n,
        (both + gained) / n,
        difference,
        min(low, difference),
        max(high, difference),
        n,
        mcnemar(lost, gained),
        "McNemar's exact test; Newcombe's interval",
    )


def _paired_means(measure: Measure, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    base, other = ([pair[i] for pair in pairs] for i in (0, 1))
    difference, low, high = _mean([after - before for before, after in pairs])
    n = len(pairs)
    method = "paired bootstrap" if n <= BOOTSTRAP_UP_TO else "paired, normal"
    means = (math.fsum(base) / n, math.fsum(other) / n)
    return PairedDifference(measure.name, *means, difference, low, high, n, None, method)
