"""The most exact context that fits is chosen."""

import pytest

from ray_abliterate.errors import UnsupportedCarry
from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
from tests.evaluation.streaming.conftest import (
    model,
    streamed,
)


def test_the_most_exact_carry_that_fits_is_chosen_and_said():
    def chosen(family, length):
        choice = StreamingEvaluator(model(family)).choose(length)
        return choice.carry.value, " ".join(choice.notes)

    assert chosen("mamba2", None) == (
        "state",
        "carry = state: its state is exact and of constant size",
    )
    assert chosen("mistral", None)[0] == "kv"
    assert chosen("llama", 300)[0] == "kv"
    assert chosen("llama", None)[0] == "window"
    name, why = chosen("llama", 10**6)
    assert name == "window" and "1000000 tokens, and the model was made for 512" in why
    assert chosen("gpt2", 10**6)[0] == "none"
    assert chosen("falcon_h1", 300)[0] == "kv"


def test_keys_and_values_that_do_not_fit_are_not_chosen(monkeypatch):
    evaluator = StreamingEvaluator(model("llama"))
    monkeypatch.setattr(
        "ray_abliterate.evaluation.streaming.carry_choice.free_bytes", lambda _: 1000
    )
    choice = evaluator.choose(300)
    assert choice.carry is CarriedContext.WINDOW
    assert "don't fit" in choice.notes[-1]


def test_positions_that_a_model_lacks_are_refused(text):
    small = model("gpt2", max_position_embeddings=128)
    with pytest.raises(UnsupportedCarry, match="has 128 positions"):
        streamed(small, text, carry="kv", chunk_size=50)
    assert len(streamed(small, text[:129], carry="kv", chunk_size=50)) == 3
    chunks = streamed(small, text, carry="none")
    assert chunks[0].stop == 128
    with pytest.raises(UnsupportedCarry, match="chunk_size = 128 or less"):
        streamed(small, text, carry="none", chunk_size=200)
