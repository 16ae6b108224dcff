"""A window is what a mask made by hand computes."""

import pytest
import torch
from torch import Tensor

from tests.evaluation.streaming.conftest import (
    close,
    full_losses,
    losses_by_chunk,
    model,
    streamed,
)


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
