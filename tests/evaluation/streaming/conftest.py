"""Tiny models of many families, and a made-up text."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ray_abliterate.evaluation.streaming import StreamingEvaluator
from ray_abliterate.testing.tiny import TINY_VOCAB, tiny_model

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROUNDING = 2e-5


@cache
def model(family: str, **overrides: Any) -> Any:
    """A tiny model that many tests share; none of them changes it."""
    return tiny_model(family, **{"max_position_embeddings": 512, **overrides})


def text_of(tokens: int, seed: int = 3) -> Tensor:
    """Token ids, drawn."""
    return torch.randint(0, TINY_VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def full_losses(module: Any, ids: Tensor, **options: Any) -> Tensor:
    """Losses of one plain forward pass over the whole text."""
    with torch.inference_mode():
        logits = module(input_ids=ids[None], use_cache=False, **options).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def streamed(module: Any, ids: Tensor, **settings: Any) -> list[Any]:
    """The chunks of a text."""
    return list(StreamingEvaluator(module, **settings).stream(ids))


def losses_by_chunk(losses: Tensor, chunks: list[Any]) -> list[float]:
    """What chunks should say, from the loss of every token but the first."""
    return [float(losses[c.stop - c.tokens - 1 : c.stop - 1].double().mean()) for c in chunks]


def close(found: Any, wanted: Any, limit: float = ROUNDING) -> bool:
    """Whether losses are equal but for rounding in float32."""
    return bool(found == pytest.approx(wanted, abs=limit))


@pytest.fixture
def text() -> Tensor:
    return text_of(300)
