"""Where chunks lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.errors import EvaluationError
from ray_abliterate.evaluation.streaming import CarriedContext, ChunkGeometry


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
