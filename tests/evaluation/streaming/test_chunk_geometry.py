"""Where chunks lie, and what results add up to."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.errors import EvaluationError
from ray_abliterate.evaluation.streaming import CarriedContext, ChunkGeometry, ChunkResult, Totals


@given(st.sampled_from(CarriedContext), st.integers(2, 40), st.integers(1, 39), st.integers(2, 300))
def test_every_token_but_the_first_is_predicted_once(carry, size, overlap, tokens):
    overlap = min(overlap, size - 1) if carry is CarriedContext.NONE else 0
    geometry = ChunkGeometry(carry, size, overlap)
    predicted = []
    for index in range(geometry.chunks(tokens)):
        span = geometry.span(index)
        stop = min(span.stop, tokens)
        assert stop - span.first <= size + (carry is not CarriedContext.NONE)
        predicted += range(max(span.start, span.first + 1), stop)
    assert predicted == list(range(1, tokens))


@given(st.integers(2, 40), st.integers(2, 300))
def test_without_overlap_the_first_token_of_each_chunk_has_no_context(size, tokens):
    geometry = ChunkGeometry(CarriedContext.NONE, size)
    spans = [geometry.span(i) for i in range(geometry.chunks(tokens))]
    counted = sum(min(s.stop, tokens) - max(s.start, s.first + 1) for s in spans)
    assert counted == tokens - -(-tokens // size)
    assert all(min(s.stop, tokens) - s.first >= 2 for s in spans)


@pytest.mark.parametrize(
    ("carry", "size", "overlap", "says"),
    [
        (CarriedContext.NONE, 8, 8, "overlap = 8 leaves nothing of chunk_size = 8"),
        (CarriedContext.NONE, 8, 9, "Set overlap below 8, or chunk_size above 9"),
        (CarriedContext.NONE, 8, -1, "overlap = -1 is negative"),
        (CarriedContext.KV, 8, 2, "carry = kv: what is carried is already the context"),
        (CarriedContext.STATE, 1, 0, "chunk_size = 1: a chunk needs two tokens"),
    ],
)
def test_chunks_that_cannot_be_are_refused_with_the_fix(carry, size, overlap, says):
    with pytest.raises(EvaluationError, match=says):
        ChunkGeometry(carry, size, overlap)


def chunk(index, nats, tokens=10):
    return ChunkResult(index, 10 * index, 10 * index + tokens, tokens, nats, 0.5, 1, 100 + index)


@given(st.lists(st.floats(0.01, 500), min_size=2, max_size=30), st.randoms())
def test_totals_are_those_of_all_losses_in_whatever_order_chunks_arrive(nats, random):
    chunks = [chunk(i, n) for i, n in enumerate(nats)]
    shuffled = random.sample(chunks, len(chunks))
    totals = Totals.of(shuffled, "none", ["a note"])
    assert totals == Totals.of(chunks, CarriedContext.NONE, ["a note"])
    losses = [n / 10 for n in nats]
    mean = sum(losses) / len(losses)
    assert totals.loss == pytest.approx(sum(nats) / (10 * len(nats)))
    assert totals.mean == pytest.approx(mean)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
    assert totals.deviation == pytest.approx(deviation, abs=1e-9)
    assert totals.carried_bytes == 100 + len(nats) - 1


def test_results_survive_the_way_through_json():
    one = chunk(3, 21.5)
    totals = Totals.of([one, chunk(4, 1e9)], "kv", ("said",))
    assert ChunkResult.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one
    assert Totals.from_json(json.loads(json.dumps(totals.to_json(), allow_nan=False))) == totals
    assert one.to_json()["perplexity"] == pytest.approx(math.exp(2.15))
    assert one.to_json()["tokens_per_second"] == 20
