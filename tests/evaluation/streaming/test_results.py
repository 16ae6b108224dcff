"""What results add up to."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.evaluation.streaming import CarriedContext, ChunkResult, Totals


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
