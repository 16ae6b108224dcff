"""How scores are worded."""

from ray_abliterate.search.score import Score
from ray_abliterate.search.score_text import describe_score


def test_a_bound_is_shown_with_its_counts_and_without_an_interval() -> None:
    detail = {"hits": 16, "total": 64}
    score = Score("rate", 0.25, 0.25, 1.0, detail=detail, bound=True)
    assert describe_score(score) == "≥ 0.25 16/64"
