"""Passes that begin in the middle of a model, and the inputs of its blocks. Knows nothing of why.

Blocks below the first one are not run; the last of them returns hidden states that are known.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def start_at_block(
    blocks: Sequence[nn.Module], start: int, states: Tensor | None, in_tuple: bool = False
) -> Iterator[None]:
    """Let passes inside this block of code begin at block `start` of the model.

    Args:
        blocks: All blocks of the model.
        start: The first block that is run; 0 runs all of them.
        states: Its input, `"1 token hidden"`; needed if `start` is not 0.
        in_tuple: Whether blocks return a tuple whose first element is the hidden states.
    """
    if start == 0:
        yield
        return
    assert states is not None
    known: Tensor = states

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if in_tuple else hidden_states

    def replace(*_: Any, **__: Any) -> Any:
        return (known, None) if in_tuple else known

    skipped: list[Any] = list(blocks[:start])
    for block in skipped[:-1]:
        block.forward = skip  # shadows the class's method until it is deleted
    skipped[-1].forward = replace
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


@contextmanager
def record_block_inputs(
    blocks: Sequence[nn.Module], layers: Sequence[int], inputs: dict[int, Tensor]
) -> Iterator[None]:
    """Store the inputs of some blocks, `"1 token hidden"`, in `inputs` while the body runs.

    Args:
        blocks: All blocks of the model.
        layers: The blocks whose inputs are wanted.
        inputs: Receives them, by block.
    """

    def record(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            inputs[layer] = args[0] if args else options["hidden_states"]

        return hook

    handles = [blocks[i].register_forward_pre_hook(record(i), with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
