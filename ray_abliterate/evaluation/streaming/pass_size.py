"""How many tokens fit into one pass through a model, from what a token costs in memory."""

from typing import Any

import torch

from ray_abliterate.model.batch_size import MemoryCost
from ray_abliterate.model.devices import free_bytes

MOST = {"cpu": 1024, "mps": 2048}
"""Most tokens of a pass, by device type. Longer passes gain nothing on a CPU: the weights are read
once per pass, and the arithmetic of 1,024 tokens hides that."""
MOST_CUDA = 8192
LEAST = 16
UNKNOWN_SHAPES = 256
"""Tokens of a pass for a model whose shapes are unknown."""
SLICE_BYTES, SLICE_BYTES_CUDA = 1 << 26, 1 << 28
"""Most bytes of float32 logits that exist at a time."""
SMALL_BYTES, ENOUGH_ROWS = 1 << 22, 128
"""On a CPU, slices of this size come from memory that the process already has; larger ones are
requested from the system each time, at one page fault per page. Fewer rows than this would
multiply more slowly."""


def tokens_per_pass(module: Any, device: torch.device, behind: int) -> int:
    """Return the number of tokens of a pass that fits into memory, a power of two.

    Args:
        module: The model.
        device: The device it is on.
        behind: Tokens that attention reaches back to in addition to those of the pass.
    """
    try:
        config, cost = module.config.get_text_config(decoder=True), MemoryCost.of(module, 0)
    except AttributeError:
        return UNKNOWN_SHAPES
    heads = getattr(config, "num_attention_heads", None) or 1
    # eager attention stores scores and their softmax; other kinds at most a mask
    scores = (
        2 * heads * cost.element if config._attn_implementation == "eager" else 1 + cost.element
    )
    free, tokens = free_bytes(device), MOST.get(device.type, MOST_CUDA)
    while tokens > LEAST and tokens * (cost.activations + scores * (tokens + behind)) > free:
        tokens //= 2
    return tokens


def slice_rows(vocab: int, device: torch.device) -> int:
    """Return the number of positions whose logits are computed at a time."""
    row = 4 * vocab
    if device.type == "cuda":
        return max(1, SLICE_BYTES_CUDA // row)
    return max(1, SMALL_BYTES // row, min(ENOUGH_ROWS, SLICE_BYTES // row))


def kv_bytes_per_token(config: Any, full_layers: int, size: int) -> int:
    """Return the bytes of one token's keys and values in layers that keep all of them.

    Args:
        config: The configuration of the text model.
        full_layers: Number of such layers.
        size: Bytes of one number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * full_layers * heads * width * size)
