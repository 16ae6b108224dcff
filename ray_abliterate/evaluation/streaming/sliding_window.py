"""Attention that reaches back so many tokens, in models that were not made for it.

Two things bound it: cache layers that keep the last keys and values only, and a mask over what a
pass sees, so that all tokens of a pass reach back equally far. Each token attends to itself and to
the `window - 1` tokens before it, in every layer; a model's own narrower windows stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.cache_utils import (
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    sliding_window_overlay,
)

from ray_abliterate.evaluation.streaming.cache_state import keeps_every_position

MASKED = ("eager", "sdpa", "flex_attention")
"""Kinds of attention that take any mask; the flash kernels don't."""
_window: ContextVar[int | None] = ContextVar("window", default=None)


class _Bounded(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Bounded by us: masks are made for it as for full attention, which its layer has."""

    is_sliding = False


class _HybridBounded(LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """The same beside a recurrent state."""

    is_sliding = False


def bounded_cache(config: Any, window: int) -> Any:
    """A cache whose attention layers keep `window - 1` tokens at most: a pass adds its own."""
    cache = DynamicCache(config=config)
    cache.layers = [_bounded(layer, window) for layer in cache.layers]
    return cache


def _bounded(layer: Any, window: int) -> Any:
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _HybridBounded(window, layer.number_of_states)
    if keeps_every_position(layer):
        return _Bounded(window)
    if getattr(layer, "sliding_window", None):
        layer.sliding_window = min(layer.sliding_window, window)
    return layer


@contextmanager
def reaching(window: int | None) -> Iterator[None]:
    """Masks that are made in this block (in this thread) reach back so many tokens at most."""
    if window is not None:
        _know_windows()
    token = _window.set(window)
    try:
        yield
    finally:
        _window.reset(token)


def _know_windows() -> None:
    """Have transformers' masks ask for the window of the block they are made in."""
    for name in MASKED:
        make = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not getattr(make, "knows_windows", False):
            AttentionMaskInterface.register(name, _asking(make))


def _asking(make: Callable[..., Any]) -> Callable[..., Any]:
    def masked(*args: Any, **options: Any) -> Any:
        window = _window.get()
        if window is not None:
            overlay = sliding_window_overlay(window)
            options["mask_function"] = and_masks(options["mask_function"], overlay)
            # a causal mask that is left out would let the whole pass be seen
            options["allow_is_causal_skip"] = False
        return make(*args, **options)

    masked.knows_windows = True  # type: ignore[attr-defined]
    return masked
