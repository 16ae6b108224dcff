"""An estimate of the memory that a recipe's model needs, from its configuration, without weights.

The model's skeleton (`model/skeleton.py`) has names and shapes; its writers are found as a replica
finds them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ray_abliterate.ablation.planned_edits import PROJECTION_BUDGET_BYTES
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.methods.recipe_methods import rows_per_layer
from ray_abliterate.model.architecture import Writer, hidden_size, text_config
from ray_abliterate.model.quantization import compute_dtype
from ray_abliterate.recipe import KeywordRate, KlDivergence, Recipe

CHARACTERS_PER_TOKEN = 3
TEMPLATE_TOKENS = 64
UNKNOWN_PROMPT_TOKENS = 512
"""Length that is assumed where no prompts could be read."""
BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "torchao-int4": 1 + 4 / 32}
"""Scales included; 1 in 8 bits. torchao's portable format stores 4 bits in a byte."""
USUAL_BATCH = 32
"""Rows of a batch where the recipe leaves them to memory: fewer are taken if these don't fit."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that one replica needs.

    Attributes:
        parameters: Number of parameters.
        dtype: The dtype of the weights.
        weights: Bytes of the model.
        cache: Bytes of the pristine copies of the writers, and of their products with directions.
        batch: Bytes of keys, values, activations and logits of the largest batch.
        host: Bytes of the base model's logits, in CPU memory.
    """

    parameters: int
    dtype: torch.dtype
    weights: int
    cache: int
    batch: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device if the weight cache is there too."""
        return self.weights + self.cache + self.batch


def estimate_memory(
    module: nn.Module,
    writers: Iterable[Writer],
    recipe: Recipe,
    prompts: Iterable[PromptSet],
) -> MemoryEstimate:
    """Estimate the memory of one replica.

    Args:
        module: The model or its skeleton.
        writers: Its writers.
        recipe: Dtype, batch size and scorers.
        prompts: All prompt sets that could be read.
    """
    config = text_config(module)
    dtype = compute_dtype(module.config, recipe.model.dtype)
    written = [module.get_parameter(writer.parameter) for writer in writers]
    parameters = sum(p.numel() for p in module.parameters())
    small = _quantized(module, recipe.model.quantization)
    layers, hidden = int(config.num_hidden_layers), hidden_size(module)
    rows_each = rows_per_layer(recipe.direction)
    products = {id(p): 4 * layers * rows_each * (p.numel() // hidden + hidden) for p in written}
    always = sum(own for key, own in products.items() if key in small)
    fitting = min(sum(products.values()) - always, PROJECTION_BUDGET_BYTES)
    copies = dtype.itemsize * sum(p.numel() for p in written if id(p) not in small)
    rows, width = _largest_batch(recipe, list(prompts))
    logit_tokens = max((s.tokens for s in recipe.scorers if isinstance(s, KlDivergence)), default=1)
    vocabulary = int(config.vocab_size)
    batch = rows * (
        _bytes_per_token(config, dtype) * width + logit_tokens * vocabulary * (dtype.itemsize + 4)
    )
    return MemoryEstimate(
        parameters,
        dtype,
        int(sum(p.numel() * small.get(id(p), dtype.itemsize) for p in module.parameters())),
        copies + always + fitting,
        batch,
        sum(4 * vocabulary * count for count in _base_logits(recipe, list(prompts))),
    )


def _quantized(module: nn.Module, wanted: str | None) -> dict[int, float]:
    """Return bytes per number of the parameters that are quantized: linear layers but the last."""
    if wanted is None:
        return {}
    last = getattr(module, "lm_head", None)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m is not last]
    return {id(m.weight): BYTES_PER_WEIGHT.get(wanted, 1.0) for m in linears}


def _largest_batch(recipe: Recipe, prompts: list[PromptSet]) -> tuple[int, int]:
    """Return rows and tokens of the largest batch, answers included."""
    longest = max(
        (len(p.user) + len(p.system or "") for s in prompts for p in s.prompts), default=0
    )
    tokens = longest // CHARACTERS_PER_TOKEN or UNKNOWN_PROMPT_TOKENS
    answers = [s.max_new_tokens for s in recipe.scorers if isinstance(s, KeywordRate)]
    answers += [s.tokens for s in recipe.scorers if isinstance(s, KlDivergence)]
    return recipe.run.batch_size or USUAL_BATCH, tokens + TEMPLATE_TOKENS + max(answers, default=1)


def _bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token: keys and values of all layers, and activations of one."""
    hidden, heads = int(config.hidden_size), int(getattr(config, "num_attention_heads", 1) or 1)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else int(inner)
    keys_and_values = 2 * int(config.num_hidden_layers) * key_heads * head
    return dtype.itemsize * (keys_and_values + 8 * hidden + 3 * inner)


def _base_logits(recipe: Recipe, prompts: list[PromptSet]) -> list[int]:
    """Return the rows of logits that each KL scorer stores."""
    sizes = {s.name: len(s) for s in prompts}
    return [
        sizes.get(scorer.name, 0) * scorer.tokens
        for scorer in recipe.scorers
        if isinstance(scorer, KlDivergence)
    ]
