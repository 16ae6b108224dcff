"""Prefix caching: the tokens that all prompts begin with (template, system prompt), computed once.

A batch then starts from the prefix's keys and values, repeated for its rows. Only for models whose
every layer caches plain keys and values; whether it changes a model's output is measured on the
model itself (`PaddedModel`). Knows nothing about prompts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_abliterate.model.devices import device_of

WORTHWHILE_TOKENS = 8
"""A shorter prefix is not worth a pass of its own."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that rows begin with, and their keys and values.

    Attributes:
        length: The number of tokens.
        cache: A transformers cache of one row; None if nothing is shared.
    """

    length: int = 0
    cache: Any = None

    def for_rows(self, count: int) -> Any:
        """Return a copy of the cache for a batch of `count` rows."""
        if self.cache is None:
            return None
        repeated = copy.deepcopy(self.cache)
        repeated.batch_repeat_interleave(count)
        return repeated


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with, at least one of each row left over."""
    if len(rows) < 2:
        return 0
    ordered = sorted(list(row) for row in rows)
    first, last = ordered[0], ordered[-1]  # in lexical order, these two share the least
    shared = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(len(row) for row in rows) - 1)


def can_cache_prefix(module: Any) -> bool:
    """Return whether a model's state consists of nothing but plain keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if getattr(module, "_is_stateful", False) or not module._supports_default_dynamic_cache():
        return False
    cache = DynamicCache(config=module.config.get_text_config(decoder=True))
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


@torch.inference_mode()
def compute_prefix(module: Any, tokens: Sequence[int]) -> Prefix:
    """Run one pass over the prefix, and return it with its keys and values."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=module.config.get_text_config(decoder=True))
    ids = torch.tensor(
        [list(tokens)], device=device_of(module.get_input_embeddings())
    )  # (1, token)
    body = getattr(module, module.base_model_prefix, module)  # without the head
    body(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(len(tokens), cache)
