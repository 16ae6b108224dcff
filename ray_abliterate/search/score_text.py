"""How a score is worded for people: in tables, pages and the model card.

Plain text; knows nothing about terminals, HTML or figures.
"""

from ray_abliterate.search.score import Score


def describe_score(score: Score) -> str:
    """Return a score in a few characters: the value, counts if it has them, and the interval.

    Of a bound only the relation and the value remain, as in `≥ 0.25`.
    """
    hits, total = score.detail.get("hits"), score.detail.get("total")
    counts = f" {hits}/{total}" if hits is not None and total is not None else ""
    interval = "" if score.bound else f" [{score.low:.3g}, {score.high:.3g}]"
    return f"{score.relation}{score.value:.4g}{counts}{interval}"


def number_text(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.3g}"


def value_text(score: Score) -> str:
    """Return a score's value with its interval, or a bound with its relation."""
    if score.bound:
        return f"{score.relation}{number_text(score.value)}"
    return f"{number_text(score.value)} [{number_text(score.low)}, {number_text(score.high)}]"


def counts_text(score: Score) -> str:
    """Return `hits/total` if the score was counted, and nothing otherwise."""
    hits, total = score.detail.get("hits"), score.detail.get("total")
    return f"{hits}/{total}" if isinstance(hits, int) and isinstance(total, int) else ""
