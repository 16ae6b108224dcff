"""Scores and scorecards, and the intervals around them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ray_abliterate.errors import ScoreError
from ray_abliterate.search.score import Score, Scorecard, mean_interval, wilson

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
GOALS = st.sampled_from(["minimize", "maximize", "report"])


@st.composite
def scorecards(draw) -> Scorecard:
    """Scorecards with one to four scores of different names."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
    scores = []
    for name in names:
        low, value, high = sorted(draw(st.tuples(FINITE, FINITE, FINITE)))
        detail = draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)))
        bound = draw(st.booleans())
        scores.append(Score(name, value, low, high, draw(GOALS), "nats", detail, bound))
    return Scorecard(tuple(scores))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", ["value", "low", "high"])
def test_a_score_that_is_not_a_finite_number_is_an_error(bad, label):
    numbers = {"value": 0.5, "low": 0.0, "high": 1.0} | {label: bad}
    with pytest.raises(ScoreError, match=f"mine: {label} is"):
        Score("mine", **numbers)


@pytest.mark.parametrize(
    ("value", "low", "high"), [(0.5, 0.6, 1.0), (0.5, 0.0, 0.4), (0.5, 1.0, 0.0)]
)
def test_a_score_lies_in_its_interval(value, low, high):
    with pytest.raises(ScoreError, match="outside"):
        Score("mine", value, low, high)


def test_a_scorecard_needs_a_score():
    with pytest.raises(ScoreError):
        Scorecard(())


@given(scorecards())
def test_a_scorecard_survives_json(scorecard):
    assert Scorecard.from_list(json.loads(json.dumps(scorecard.to_list()))) == scorecard


def test_a_score_written_before_there_were_bounds_is_none():
    old = Score("mine", 0.5, 0.0, 1.0).to_dict()
    del old["bound"]
    (score,) = Scorecard.from_list([old]).scores
    assert not score.bound and score == Score("mine", 0.5, 0.0, 1.0)


@pytest.mark.parametrize(("goal", "relation"), [("minimize", "≥ "), ("maximize", "≤ ")])
def test_a_bound_says_on_which_side_of_it_the_score_lies(goal, relation):
    assert Score("mine", 0.5, 0.0, 1.0, goal, bound=True).relation == relation
    assert Score("mine", 0.5, 0.0, 1.0, goal).relation == ""


@given(scorecards())
def test_losses_follow_the_order_of_scores_and_smaller_is_better(scorecard):
    expected = [
        -score.value if score.goal == "maximize" else score.value
        for score in scorecard.scores
        if score.goal != "report"
    ]
    assert list(scorecard.losses) == expected
    assert [score.name for score in scorecard.objectives] == [
        score.name for score in scorecard.scores if score.goal != "report"
    ]


def test_metrics_carry_every_score_with_its_interval():
    scorecard = Scorecard(
        (Score("kl-divergence", 2.0, 1.0, 3.0), Score("note", 5.0, 5.0, 5.0, "report"))
    )
    assert scorecard.metrics() == {
        "kl-divergence": 2,
        "kl-divergence/low": 1,
        "kl-divergence/high": 3,
        "note": 5,
        "note/low": 5,
        "note/high": 5,
    }
    assert scorecard["note"].value == 5
    with pytest.raises(KeyError):
        scorecard["nope"]


# Intervals


def test_wilson_gives_known_values():
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(100, 100) == pytest.approx((0.9630, 1.0), abs=5e-5)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(100, 100)[1] == 1.0


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(counts):
    hits, total = counts
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    assert wilson(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_and_its_wilson_interval_make_a_score(counts):
    hits, total = counts
    low, high = wilson(hits, total)
    assert Score("rate", hits / total, low, high).value == hits / total
    assert 0 <= low < high <= 1


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_a_rate_of_nothing_is_refused(hits, total):
    with pytest.raises(ValueError, match="no rate"):
        wilson(hits, total)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_interval_of_a_mean_holds_the_mean_and_is_the_same_each_time(values):
    mean, low, high = mean_interval(values)
    assert min(values) - 1e-6 <= low <= mean <= high <= max(values) + 1e-6
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert mean_interval(values) == (mean, low, high)
    Score("mean", mean, low, high)


def test_the_interval_of_a_mean_narrows_with_more_values():
    few, many = mean_interval([0.0, 1.0] * 5), mean_interval([0.0, 1.0] * 200)
    assert many[2] - many[1] < few[2] - few[1]
    assert few[0] == many[0] == 0.5
