"""What each carry computes, against one full forward pass and against windows by brute force."""

import copy

import pytest
import torch
from torch import Tensor

from ray_abliterate.errors import UnsupportedCarry
from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
from tests.evaluation.streaming.conftest import (
    full_losses,
    losses_by_chunk,
    model,
    streamed,
    text_of,
)

ATTENTION = ("llama", "gemma2", "gemma3_text", "mistral", "gpt2", "qwen3_moe", "gpt_oss", "opt")
HYBRID = ("falcon_h1", "bamba", "qwen3_next", "granitemoehybrid", "lfm2")
ROUNDING = 2e-5
LINEAR_ROUNDING = 1e-3
"""Of linear attention, whose chunked form adds in another order (qwen3_next)."""


def close(found, wanted, limit=ROUNDING):
    return found == pytest.approx(wanted, abs=limit)


@pytest.mark.parametrize(
    ("family", "chunk_size"), [("llama", 150), ("gemma3_text", 5), *((f, 37) for f in ATTENTION)]
)
def test_carried_keys_and_values_give_the_losses_of_one_full_pass(family, chunk_size, text):
    chunks = streamed(model(family), text, carry="kv", chunk_size=chunk_size)
    wanted = losses_by_chunk(full_losses(model(family), text), chunks)
    assert close([c.loss for c in chunks], wanted)
    assert sum(c.tokens for c in chunks) == len(text) - 1


@pytest.mark.parametrize("family", HYBRID)
def test_hybrids_are_exact_with_state_and_keys(family, text):
    chunks = streamed(model(family), text, carry="kv", chunk_size=70)
    wanted = losses_by_chunk(full_losses(model(family), text), chunks)
    limit = LINEAR_ROUNDING if family == "qwen3_next" else ROUNDING
    assert close([c.loss for c in chunks], wanted, limit)
    with pytest.raises(UnsupportedCarry, match="full attention, whose keys and values grow"):
        StreamingEvaluator(model(family), carry="state")


def test_a_recurrent_state_gives_one_full_pass_in_constant_memory(text):
    chunks = streamed(model("mamba2"), text, carry="state", chunk_size=70)
    wanted = losses_by_chunk(full_losses(model("mamba2"), text), chunks)
    assert close([c.loss for c in chunks], wanted)
    assert len({c.carried_bytes for c in chunks}) == 1


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


def band(tokens: int, window: int) -> Tensor:
    """Additive mask by brute force: a token sees itself and the `window - 1` before it."""
    place = torch.arange(tokens)
    away = place[:, None] - place[None]
    mask = torch.zeros(tokens, tokens)
    mask[(away < 0) | (away >= window)] = torch.finfo(torch.float32).min
    return mask[None, None]


@pytest.mark.parametrize(
    ("family", "window", "chunk_size"),
    [
        ("llama", 2, 37),
        ("llama", 9, 5),
        ("llama", 9, 37),
        ("llama", 64, 120),
        ("llama", 64, 7),
        ("gpt2", 9, 37),
        ("qwen3_moe", 20, 37),
    ],
)
def test_a_window_is_the_brute_force_one_whatever_the_chunks(family, window, chunk_size, text):
    text = text[:200]
    chunks = streamed(model(family), text, carry="window", window=window, chunk_size=chunk_size)
    masked = full_losses(model(family), text, attention_mask=band(len(text), window))
    assert close([c.loss for c in chunks], losses_by_chunk(masked, chunks))
    assert masked.mean() != pytest.approx(float(full_losses(model(family), text).mean()), abs=1e-3)


@pytest.mark.parametrize("window", [5, 20])
def test_a_window_leaves_a_models_own_narrower_windows_alone(window, text):
    gemma, text = model("gemma2"), text[:200]
    own = gemma.config.sliding_window
    masks = {
        "full_attention": band(len(text), window),
        "sliding_attention": band(len(text), min(own, window)),
    }
    masked = full_losses(gemma, text, attention_mask=masks)
    chunks = streamed(gemma, text, carry="window", window=window, chunk_size=33)
    assert close([c.loss for c in chunks], losses_by_chunk(masked, chunks))


@pytest.mark.parametrize("family", ["falcon_h1", "zamba2", "nemotron_h"])
def test_a_window_beside_a_recurrent_state_is_the_brute_force_one(family, text):
    masks = {"full_attention": band(150, 9), "linear_attention": None}
    masked = full_losses(model(family), text[:150], attention_mask=masks)
    chunks = streamed(model(family), text[:150], carry="window", window=9, chunk_size=40)
    assert close([c.loss for c in chunks], losses_by_chunk(masked, chunks))


def test_a_window_is_what_a_sliding_window_model_with_these_weights_computes(text):
    slides = model("mistral", sliding_window=11)
    plain = model("llama")
    kept = {name: value.clone() for name, value in plain.state_dict().items()}
    try:
        plain.load_state_dict(slides.state_dict())
        by_us = streamed(plain, text, carry="window", window=11, chunk_size=50)
    finally:
        plain.load_state_dict(kept)
    by_itself = streamed(slides, text, carry="kv", chunk_size=50)
    assert close([c.loss for c in by_us], [c.loss for c in by_itself])


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_h1"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_hold_in_every_kind_of_attention(family, attention, text):
    module = model(family, attn_implementation=attention)
    assert module.config._attn_implementation == attention
    many = streamed(module, text[:120], carry="window", window=7, chunk_size=40)
    single = streamed(module, text[:120], carry="window", window=7, chunk_size=2)
    in_forties = [sum(c.nats for c in single[i : i + 20]) for i in range(0, 60, 20)]
    assert close([c.nats for c in many], in_forties, 1e-3)


def test_the_cache_of_a_window_does_not_grow_and_that_of_keys_and_values_does(text):
    bounded = streamed(model("llama"), text, carry="window", window=16, chunk_size=50)
    growing = streamed(model("llama"), text, carry="kv", chunk_size=50)
    assert len({c.carried_bytes for c in bounded[1:]}) == 1
    sizes = [c.carried_bytes for c in growing]
    assert sizes == sorted(sizes) and sizes[-1] > 5 * sizes[0]


@pytest.mark.parametrize("family", ["llama", "mamba2", "mamba", "falcon_h1"])
def test_chunks_without_carry_are_passes_of_their_own(family, text):
    chunks = streamed(model(family), text, carry="none", chunk_size=80, overlap=30)
    for number, found in enumerate(chunks):
        first = 50 * number
        losses = full_losses(model(family), text[first : first + 80])
        own = losses if number == 0 else losses[29:]
        assert close(found.loss, float(own.double().mean()))
        assert found.tokens == len(own)
        assert found.carried_bytes == 0


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
