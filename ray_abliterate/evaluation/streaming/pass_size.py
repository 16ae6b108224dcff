"""How many tokens go through a model at once, from what they cost."""

from typing import Any

import torch

from ray_abliterate.model.batch_size import Cost
from ray_abliterate.model.devices import free_bytes

MOST = {"cpu": 1024, "mps": 2048}
"""More tokens a pass save nothing on a CPU: the weights are read once per pass, and 1,024 tokens
of arithmetic hide that."""
MOST_CUDA = 8192
LEAST = 16
UNKNOWN = 256
"""Tokens a pass for a model whose shapes tell nothing."""
SLICE_BYTES, SLICE_BYTES_CUDA = 1 << 26, 1 << 28
"""Of float32 logits that exist at a time, at most."""
SMALL_BYTES, ENOUGH_ROWS = 1 << 22, 128
"""On a CPU, slices of this size are taken from memory that the process has already; larger ones are
asked of the system each time, and each of their pages costs a fault. Fewer rows than this would
multiply slower."""


def tokens_per_pass(module: Any, device: torch.device, behind: int) -> int:
    """A power of two.

    Args:
        module: The model.
        device: Where it is.
        behind: Tokens that attention reaches back to beside those of the pass.
    """
    try:
        config, cost = module.config.get_text_config(decoder=True), Cost.of(module, 0)
    except AttributeError:
        return UNKNOWN
    heads = getattr(config, "num_attention_heads", None) or 1
    # eager attention keeps scores and their softmax; others at most a mask
    scores = 2 * heads * cost.size if config._attn_implementation == "eager" else 1 + cost.size
    free, tokens = free_bytes(device), MOST.get(device.type, MOST_CUDA)
    while tokens > LEAST and tokens * (cost.read + scores * (tokens + behind)) > free:
        tokens //= 2
    return tokens


def slice_rows(vocab: int, device: torch.device) -> int:
    """Positions whose logits are computed at a time."""
    row = 4 * vocab
    if device.type == "cuda":
        return max(1, SLICE_BYTES_CUDA // row)
    return max(1, SMALL_BYTES // row, min(ENOUGH_ROWS, SLICE_BYTES // row))


def kv_bytes_per_token(config: Any, full_layers: int, size: int) -> int:
    """Keys and values of one token, in layers that keep all."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * full_layers * heads * width * size)
