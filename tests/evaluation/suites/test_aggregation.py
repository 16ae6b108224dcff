"""Scores of chunks, and two models on the same items."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.suites.aggregation import (
    compare_suites,
    mcnemar,
    merge_chunks,
    newcombe_interval,
    summarise,
)
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk
from ray_abliterate.search.score import wilson

RATE, MEAN = Measure("right", "rate", "maximize"), Measure("nats", "mean", "minimize", "nats")


def result(name: str, group: str = "", counts: dict | None = None, **values: list) -> SuiteChunk:
    size = len(next(iter(values.values())))
    chunk = Chunk("s", name, group, tuple({"id": f"{name}:{i}"} for i in range(size)))
    return SuiteChunk.of(chunk, values, counts)


def test_a_rate_counts_items_and_has_wilsons_interval() -> None:
    chunks = [result("0", right=[1.0, 0.0, 1.0]), result("1", right=[1.0])]
    (score,) = summarise("s", [RATE], chunks)
    assert (score.name, score.value) == ("s", 0.75)
    assert (score.low, score.high) == wilson(3, 4)
    assert score.detail["hits"] == 3


def test_what_is_not_known_is_in_no_denominator() -> None:
    (score,) = summarise("s", [RATE], [result("0", right=[1.0, None, 0.0, None])])
    assert score.value == 0.5
    assert (score.detail["items"], score.detail["unknown"]) == (2, 2)
    with pytest.raises(ScoreError, match="is unknown for all 2 items"):
        summarise("s", [RATE], [result("0", right=[None, None])])


def test_each_group_has_a_score_and_the_same_weight_in_the_macro_mean() -> None:
    chunks = [result("a/0", "a", right=[1.0] * 9), result("b/0", "b", right=[0.0])]
    scores = {score.name: score for score in summarise("s", [RATE, MEAN][:1], chunks)}
    assert list(scores) == ["s", "s/macro", "s/a", "s/b"]
    assert (scores["s"].value, scores["s/macro"].value) == (0.9, 0.5)
    half_a, half_b = 1 - wilson(9, 9)[0], wilson(0, 1)[1]
    assert scores["s/macro"].low == pytest.approx(0.5 - half_a / 2)
    assert scores["s/macro"].high == pytest.approx(0.5 + half_b / 2)


def test_counts_and_sums_add_up() -> None:
    chunks = [result(str(i), counts={"tokens": i}, right=[1.0]) for i in range(4)]
    chunks = [replace(chunk, sums={"nats": 0.1}) for chunk in chunks]
    (score,) = summarise("s", [RATE], chunks)
    assert (score.detail["tokens"], score.detail["nats"]) == (6, 0.4)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), min_size=1, max_size=6),
    st.randoms(),
)
def test_scores_are_the_same_bits_in_any_order(values: list, chance: random.Random) -> None:
    chunks = [result(str(i), nats=own) for i, own in enumerate(values)]
    shuffled = [*chunks, chunks[0]]
    chance.shuffle(shuffled)
    assert summarise("s", [MEAN], shuffled) == summarise("s", [MEAN], chunks)


def test_many_values_have_a_normal_interval_that_takes_no_memory() -> None:
    chance = random.Random(0)
    chunks = [result(str(i), nats=[chance.gauss(3, 2) for _ in range(500)]) for i in range(8)]
    (score,) = summarise("s", [MEAN], chunks)
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * 2 / math.sqrt(4000), rel=0.05)


def test_a_chunk_of_other_items_is_refused() -> None:
    one = result("0", right=[1.0])
    with pytest.raises(ScoreError, match="two results are of different items"):
        summarise("s", [RATE], [one, replace(one, fingerprint="other")])
    with pytest.raises(ScoreError, match="two results are of different items"):
        compare_suites([RATE], [one], [replace(one, fingerprint="other")])
    with pytest.raises(ScoreError, match="is no part of 's'"):
        summarise("s", [RATE], [replace(one, suite="t")])
    with pytest.raises(ScoreError, match="no chunk has been measured"):
        summarise("s", [RATE], [])


def test_merged_chunks_come_once_and_by_id() -> None:
    chunks = [result(name, right=[1.0]) for name in ("b/0", "a/1", "a/0")]
    assert [c.chunk for c in merge_chunks("s", [*chunks, chunks[0]])] == ["a/0", "a/1", "b/0"]


def test_of_two_results_of_one_chunk_the_same_one_counts_whichever_came_first() -> None:
    one, other = result("0", nats=[1.0]), result("0", nats=[2.0])
    assert summarise("s", [MEAN], [one, other]) == summarise("s", [MEAN], [other, one])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ScoreError, match="is not a finite number"):
        result("0", nats=[value])


def test_a_value_for_every_item_or_none() -> None:
    with pytest.raises(ScoreError, match="1 values of 'right' for 2 items"):
        SuiteChunk.of(Chunk("s", "0", "", ({"id": "a"}, {"id": "b"})), {"right": [1.0]})


# Two models


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_only_items_that_both_have_are_compared() -> None:
    base = [result("0", right=[1.0, 1.0, None, 0.0]), result("1", right=[1.0])]
    other = [result("0", right=[0.0, 1.0, 1.0, None])]
    (found,) = compare_suites([RATE], base, other)
    assert (found.items, found.base, found.other, found.difference) == (2, 1.0, 0.5, -0.5)
    assert found.p == mcnemar(1, 0)
    assert found.low < -0.5 < found.high


def test_a_comparison_tests_what_was_lost_against_what_was_gained() -> None:
    base, other = [1.0] * 6 + [0.0, 1.0], [0.0] * 6 + [1.0, 1.0]
    (found,) = compare_suites([RATE], [result("0", right=base)], [result("0", right=other)])
    assert found.p == mcnemar(6, 1) < 0.2
    assert found.difference == -5 / 8


def test_pairs_show_a_difference_that_means_alone_hide() -> None:
    chance = random.Random(1)
    values = [chance.gauss(0, 10) for _ in range(50)]
    better = [value - 0.5 + chance.gauss(0, 0.1) for value in values]
    (found,) = compare_suites([MEAN], [result("0", nats=values)], [result("0", nats=better)])
    assert found.difference == pytest.approx(-0.5, abs=0.05)
    assert found.high < -0.4
    assert found.p is None


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(lambda counts: sum(counts) > 0))
def test_the_interval_of_a_paired_difference_holds_it_and_turns_with_it(counts: tuple) -> None:
    both, lost, gained, neither = counts
    low, high = newcombe_interval(both, lost, gained, neither)
    difference = (gained - lost) / sum(counts)
    assert -1 <= low <= difference <= high <= 1
    turned = newcombe_interval(both, gained, lost, neither)
    assert turned == pytest.approx((-high, -low))
    assert low < high


def test_the_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    chance, covered = random.Random(2), 0
    kinds = ["both"] * 60 + ["lost"] * 20 + ["gained"] * 8 + ["neither"] * 12
    for _ in range(600):
        drawn = [chance.choice(kinds) for _ in range(60)]
        low, high = newcombe_interval(
            *(drawn.count(k) for k in ("both", "lost", "gained", "neither"))
        )
        covered += low <= -0.12 <= high
    assert 0.93 <= covered / 600 <= 0.985
