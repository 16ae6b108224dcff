"""Passes that begin in the middle of a model, and what goes into its blocks. Knows nothing of why.

Blocks below the first one are not run; the last of them answers with states that are known.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def begun_at(
    blocks: Sequence[nn.Module], start: int, states: Tensor | None, in_tuple: bool = False
) -> Iterator[None]:
    """Block `start` is the first that is run in this block of code.

    Args:
        blocks: All of the model.
        start: 0 runs all of them.
        states: Input of block `start`, `"1 token hidden"`.
        in_tuple: Blocks answer with a tuple whose first is the hidden states.
    """
    if start == 0:
        yield
        return
    assert states is not None
    known: Tensor = states

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if in_tuple else hidden_states

    def begin(*_: Any, **__: Any) -> Any:
        return (known, None) if in_tuple else known

    skipped: list[Any] = list(blocks[:start])
    for block in skipped[:-1]:
        block.forward = skip
    skipped[-1].forward = begin
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


@contextmanager
def recorded(
    blocks: Sequence[nn.Module], layers: Sequence[int], found: dict[int, Tensor]
) -> Iterator[None]:
    """Inputs of these blocks, `"1 token hidden"`, go into `found`."""

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found[layer] = args[0] if args else options["hidden_states"]

        return hook

    handles = [blocks[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
