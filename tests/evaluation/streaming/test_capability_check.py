"""What a model can carry is found out by asking it."""

import copy

import pytest
import torch

from ray_abliterate.errors import UnsupportedCarry
from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
from tests.evaluation.streaming.conftest import (
    close,
    full_losses,
    losses_by_chunk,
    model,
    text_of,
)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_state_that_is_dropped_goes_token_by_token_and_says_so(family, text):
    evaluator = StreamingEvaluator(model(family), carry="state", chunk_size=40)
    stream = evaluator.stream(text[:100])
    chunks = list(stream)
    assert [c.passes for c in chunks] == [39, 40, 20]
    wanted = losses_by_chunk(full_losses(model(family), text[:100]), chunks)
    assert close([c.loss for c in chunks], wanted)
    assert "the model's code drops their state" in " ".join(stream.totals.notes)
    assert StreamingEvaluator(model(family)).choose(100).carry is CarriedContext.NONE


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm"])
def test_a_model_that_carries_nothing_right_is_refused_with_what_was_found(family, text):
    with pytest.raises(
        UnsupportedCarry, match=r"carry = state with .*\n  Set carry to one of: none"
    ):
        StreamingEvaluator(model(family), carry="state")
    evaluator = StreamingEvaluator(model(family), chunk_size=60, overlap=20)
    first = next(iter(evaluator.stream(text)))
    wanted = full_losses(model(family), text[:60])
    assert close(first.loss, float(wanted.double().mean()), 1e-4)


def test_half_precision_is_held_to_its_own_rounding():
    half = {name: copy.deepcopy(model(name)).bfloat16() for name in ("llama", "mamba2", "mamba")}
    able = {name: StreamingEvaluator(half[name]).capabilities.pass_limits for name in half}
    assert able["llama"][CarriedContext.KV] == able["llama"][CarriedContext.WINDOW] == 0
    assert able["mamba2"][CarriedContext.STATE] == 0
    assert able["mamba"].get(CarriedContext.STATE) != 0


def test_a_model_that_forgets_is_found_out(monkeypatch):
    module = model("mamba2")
    forward = type(module.backbone).forward

    def forgets(self, input_ids=None, cache_params=None, **options):
        return forward(self, input_ids=input_ids, cache_params=None, **options)

    monkeypatch.setattr(type(module.backbone), "forward", forgets)
    evaluator = StreamingEvaluator(module)
    assert CarriedContext.STATE not in evaluator.capabilities.pass_limits
    assert evaluator.choose(None).carry is CarriedContext.NONE
    with pytest.raises(UnsupportedCarry, match="other losses than one full pass"):
        StreamingEvaluator(module, carry=CarriedContext.STATE)


def test_text_of_is_drawn_the_same_each_time():
    assert torch.equal(text_of(5), text_of(5))
