"""What is carried gives the losses of one full pass, whatever the chunks."""

import pytest

from ray_abliterate.errors import UnsupportedCarry
from ray_abliterate.evaluation.streaming import StreamingEvaluator
from tests.evaluation.streaming.conftest import (
    ROUNDING,
    close,
    full_losses,
    losses_by_chunk,
    model,
    streamed,
)

ATTENTION = ("llama", "gemma2", "gemma3_text", "mistral", "gpt2", "qwen3_moe", "gpt_oss", "opt")
HYBRID = ("falcon_h1", "bamba", "qwen3_next", "granitemoehybrid", "lfm2")
LINEAR_ROUNDING = 1e-3
"""Of linear attention, whose chunked form adds in another order (qwen3_next)."""


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
