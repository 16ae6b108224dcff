"""Sliding-window attention in models that were not made for it.

Two things bound the attention: cache layers that keep only the last keys and values, and a mask
over what a pass sees, so that all tokens of a pass reach back equally far. Each token attends to
itself and to the `window - 1` tokens before it, in every layer; a model's own narrower windows stay
as they are.
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
"""Attention implementations that take any mask; the flash kernels don't."""
_window: ContextVar[int | None] = ContextVar("window", default=None)


class _BoundedLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A cache layer that is bounded here, though the model's own layer has full attention.

    transformers makes masks for it as for full attention.
    """

    is_sliding = False


class _BoundedHybridLayer(LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """The same for a layer that also has a recurrent state."""

    is_sliding = False


def bounded_cache(config: Any, window: int) -> Any:
    """Return a cache whose attention layers keep `window - 1` tokens; a pass adds its own."""
    cache = DynamicCache(config=config)
    cache.layers = [_bounded_layer(layer, window) for layer in cache.layers]
    return cache


def _bounded_layer(layer: Any, window: int) -> Any:
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _BoundedHybridLayer(window, layer.number_of_states)
    if keeps_every_position(layer):
        return _BoundedLayer(window)
    if getattr(layer, "sliding_window", None):
        layer.sliding_window = min(layer.sliding_window, window)
    return layer


@contextmanager
def limit_attention(window: int | None) -> Iterator[None]:
    """Let the masks that this thread makes within the block reach back at most `window` tokens."""
    if window is not None:
        _register_windowed_masks()
    token = _window.set(window)
    try:
        yield
    finally:
        _window.reset(token)


def _register_windowed_masks() -> None:
    """Make transformers' mask functions heed `limit_attention`, once per process."""
    for name in MASKED:
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not getattr(make_mask, "heeds_window", False):
            AttentionMaskInterface.register(name, _windowed(make_mask))


def _windowed(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    def make_windowed_mask(*args: Any, **options: Any) -> Any:
        window = _window.get()
        if window is not None:
            overlay = sliding_window_overlay(window)
            options["mask_function"] = and_masks(options["mask_function"], overlay)
            # if the causal mask were left out, attention would see the whole pass
            options["allow_is_causal_skip"] = False
        return make_mask(*args, **options)

    make_windowed_mask.heeds_window = True  # type: ignore[attr-defined]
    return make_windowed_mask
