"""Small models of real architectures with random weights, for streaming evaluation."""

from typing import Any

VOCAB = 4096
"""Token ids of the made-up texts."""


def small_model(family: str, vocab: int = VOCAB, layers: int = 2, **overrides: Any) -> Any:
    """Return a random float32 model of a family.

    Args:
        family: Model type as transformers names it.
        vocab: Size of the vocabulary.
        layers: Number of blocks.
        **overrides: Further values of its configuration.
    """
    from transformers import logging

    from ray_abliterate.testing.tiny import tiny_model

    logging.set_verbosity_error()
    sizes = {"hidden_size": 128, "vocab_size": vocab}
    if family == "mamba2":
        shape: dict[str, Any] = {"num_heads": 8, "head_dim": 32, "chunk_size": 64, "state_size": 16}
    else:
        shape = {"intermediate_size": 384, "head_dim": 32, "max_position_embeddings": 8192}
        shape["attn_implementation"] = "sdpa"
    return tiny_model(family, layers=layers, **{**sizes, **shape, **overrides})
