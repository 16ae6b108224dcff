"""Scores of all chunks, and how two models differ on the same items. Pure values.

Nothing depends on the order in which chunks come: they are sorted by id, sums are rounded once
(`math.fsum`), and a chunk that came twice counts once.
"""

import json
import math
from collections.abc import Iterable, Sequence

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.suites.suite import Measure, PairedDifference, SuiteChunk
from ray_abliterate.search.score import Z_95, Score, mean_interval, wilson

BOOTSTRAP_UP_TO = 1000
"""Values that are bootstrapped; the mean of more is normal, and 2,000 draws of them are large."""

ItemValues = dict[tuple[str, int], float]
"""By chunk and place in it; those that are known."""


def merge_chunks(name: str, chunks: Iterable[SuiteChunk]) -> list[SuiteChunk]:
    """Each chunk once, by id.

    Raises:
        ScoreError: there is none, one is of another suite, or two of the same id asked different
            things.
    """
    found: dict[str, SuiteChunk] = {}
    for chunk in chunks:
        if chunk.suite != name:
            raise ScoreError(f"a chunk of the suite {chunk.suite!r} is no part of {name!r}")
        known = found.get(chunk.chunk, chunk)
        if known.fingerprint != chunk.fingerprint:
            raise ScoreError(
                f"{name}, chunk {chunk.chunk}: two results are of different items; the data "
                "changed in between.\n  Measure again, from the beginning."
            )
        # Either will do; but the same one, whichever came first.
        found[chunk.chunk] = min(
            known, chunk, key=lambda c: json.dumps(c.to_dict(), sort_keys=True)
        )
    if not found:
        raise ScoreError(f"{name}: no chunk has been measured")
    return [found[key] for key in sorted(found)]


def summarise(
    name: str, measures: Sequence[Measure], chunks: Iterable[SuiteChunk]
) -> tuple[Score, ...]:
    """Scores of every measure, over all items and by group.

    The first measure's score is called as the suite, others `suite.measure`; those of a group have
    `/group` behind, and the mean over groups of a rate is `suite/macro`. Rates carry Wilson's
    interval, means a bootstrap's up to 1,000 values and the normal one above.

    Args:
        name: The suite's.
        measures: The suite's.
        chunks: In any order.

    Raises:
        ScoreError: nothing is known of a measure; or see `merge_chunks`.
    """
    results = merge_chunks(name, chunks)
    groups = sorted({chunk.group for chunk in results})
    scores: list[Score] = []
    for place, measure in enumerate(measures):
        title = name if place == 0 else f"{name}.{measure.name}"
        scores.append(_score(title, measure, results))
        if len(groups) < 2:
            continue
        own = {g: [chunk for chunk in results if chunk.group == g] for g in groups}
        known = {g: some for g, some in own.items() if _values(measure.name, some)}
        parts = [_score(f"{title}/{g}", measure, some) for g, some in known.items()]
        if measure.kind == "rate":
            scores.append(_macro(f"{title}/macro", measure, parts))
        scores += parts
    return tuple(scores)


def compare_suites(
    measures: Sequence[Measure], base: Iterable[SuiteChunk], other: Iterable[SuiteChunk]
) -> tuple[PairedDifference, ...]:
    """Two models on the items that both were asked, measure by measure.

    Rates: McNemar's exact test, and Newcombe's (1998, method 10) interval of the difference of
    paired proportions. Means: a paired bootstrap.

    Args:
        measures: The suite's.
        base: Of the first model, in any order.
        other: Of the second.

    Raises:
        ScoreError: they have no chunk in common, or a chunk of the same id has other items.
    """
    found = []
    left, right = list(base), list(other)
    name = left[0].suite if left else ""
    ours, theirs = merge_chunks(name, left), merge_chunks(name, right)
    merge_chunks(name, [_emptied(chunk) for chunk in (*ours, *theirs)])
    for measure in measures:
        first, second = _values(measure.name, ours), _values(measure.name, theirs)
        both = sorted(first.keys() & second.keys())
        if not both:
            raise ScoreError(f"{name}: the two models have no item of {measure.name!r} in common")
        pairs = [(first[key], second[key]) for key in both]
        found.append((_paired_rates if measure.kind == "rate" else _paired_means)(measure, pairs))
    return tuple(found)


class AggregatedSuite:
    """A suite whose scores are those of its measures, added up over chunks as above."""

    name: str
    measures: tuple[Measure, ...]

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """Scores with intervals, whatever the order of the chunks; see `summarise`."""
        return summarise(self.name, self.measures, chunks)

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[PairedDifference, ...]:
        """How two models differ on the items that both were asked; see `compare_suites`."""
        return compare_suites(self.measures, base, other)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test (1947): are as many lost as gained?"""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def newcombe_interval(both: int, lost: int, gained: int, neither: int) -> tuple[float, float]:
    """95 % interval of (both + gained)/n − (both + lost)/n for pairs (Newcombe 1998, method 10)."""
    n = both + lost + gained + neither
    before, after = (both + lost) / n, (both + gained) / n
    low_before, high_before = wilson(both + lost, n)
    low_after, high_after = wilson(both + gained, n)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    excess: float = both * neither - lost * gained
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    phi = excess / math.sqrt(margins) if margins else 0.0

    def reach(one: float, two: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * two + two**2, 0.0))

    difference = after - before
    low = difference - reach(after - low_after, high_before - before)
    high = difference + reach(high_after - after, before - low_before)
    return max(-1.0, low), min(1.0, high)


def _emptied(chunk: SuiteChunk) -> SuiteChunk:
    """What was asked, without what came of it."""
    return SuiteChunk(chunk.suite, chunk.chunk, chunk.fingerprint, chunk.group, chunk.items)


def _values(measure: str, chunks: Iterable[SuiteChunk]) -> ItemValues:
    return {
        (chunk.chunk, place): value
        for chunk in chunks
        for place, value in enumerate(chunk.values.get(measure, ()))
        if value is not None
    }


def _score(title: str, measure: Measure, chunks: Sequence[SuiteChunk]) -> Score:
    known = _values(measure.name, chunks)
    total = sum(len(chunk.items) for chunk in chunks)
    if not known:
        raise ScoreError(f"{title}: {measure.name!r} is not known of any of {total} items")
    values = [known[key] for key in sorted(known)]
    detail: dict[str, float] = {"items": len(values), "unknown": total - len(values)}
    for part in ("counts", "sums"):
        for name in sorted({name for chunk in chunks for name in getattr(chunk, part)}):
            added: list[float] = [getattr(chunk, part).get(name, 0) for chunk in chunks]
            detail[name] = sum(added) if part == "counts" else math.fsum(added)
    if measure.kind == "rate":
        hits = round(math.fsum(values))
        low, high = wilson(hits, len(values))
        value, detail = hits / len(values), {"hits": hits, **detail}
    else:
        value, low, high = _mean(values)
    return Score(title, value, low, high, measure.better, measure.unit, detail)


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) <= BOOTSTRAP_UP_TO:
        _, low, high = mean_interval(values)
    mean = math.fsum(values) / len(values)
    if len(values) > BOOTSTRAP_UP_TO:
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        half = Z_95 * math.sqrt(variance / len(values))
        low, high = mean - half, mean + half
    return mean, min(low, mean), max(high, mean)


def _macro(title: str, measure: Measure, parts: Sequence[Score]) -> Score:
    """The mean of rates, each group counting the same; their Wilson intervals are combined as
    Zou and Donner (2008) do for sums of independent rates."""
    groups = len(parts)
    mean = math.fsum(part.value for part in parts) / groups
    below = math.sqrt(math.fsum((part.value - part.low) ** 2 for part in parts)) / groups
    above = math.sqrt(math.fsum((part.high - part.value) ** 2 for part in parts)) / groups
    low, high = max(0.0, mean - below), min(1.0, mean + above)
    return Score(title, mean, low, high, measure.better, measure.unit, {"groups": groups})


def _paired_rates(measure: Measure, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    both = sum(bool(one and two) for one, two in pairs)
    lost = sum(bool(one and not two) for one, two in pairs)
    gained = sum(bool(two and not one) for one, two in pairs)
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
    difference, low, high = _mean([two - one for one, two in pairs])
    n = len(pairs)
    method = "paired bootstrap" if n <= BOOTSTRAP_UP_TO else "paired, normal"
    means = (math.fsum(base) / n, math.fsum(other) / n)
    return PairedDifference(measure.name, *means, difference, low, high, n, None, method)
