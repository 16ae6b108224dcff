"""Records operations on tensors on any device, as a GPU's graphs do: what Python decides between
them is not done again, and every number that it has read is the one of the recording."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose result Python, or a shape, depends on."""


class CannotBeRecorded(RuntimeError):
    """The work reads a value, which a recording can't."""


def _depends_on_values(operation: Any, args: tuple[Any, ...]) -> bool:
    """Indexing is tagged for masks' sake; with numbers of places its shape is known."""
    if operation is not torch.ops.aten.index.Tensor:
        return True
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if READS & set(operation.tags) and _depends_on_values(operation, args):
            raise CannotBeRecorded(f"{operation} reads values")
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result


class Recordings:
    """A `cuda_graphs.Recorder`."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with _Operations() as operations:
            result = work()

        def replay() -> None:
            again: dict[int, Tensor] = {}

            def now(value: Any) -> Any:
                return again.get(id(value), value) if isinstance(value, Tensor) else value

            for operation, args, kwargs, before in operations.done:
                after = operation(*tree.tree_map(now, args), **tree.tree_map(now, kwargs))
                pairs = zip(tree.tree_leaves(before), tree.tree_leaves(after), strict=True)
                again |= {id(b): a for b, a in pairs if isinstance(b, Tensor)}
            result.copy_(again[id(result)])

        return replay, result
