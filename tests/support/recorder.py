"""A graph recorder for any device, which records operations on tensors as a GPU's graphs do.

What Python decides between operations is not decided again, and every number that Python has read
stays what it was while recording.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose result Python, or a shape, depends on."""


class CannotBeRecorded(RuntimeError):
    """The work reads a value, which a recorded graph can't."""


def _depends_on_values(operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation with one of the tags really reads values.

    Indexing is tagged because of masks; indexed by numbers, its shape is known.
    """
    if operation is not torch.ops.aten.index.Tensor:
        return True
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class _OperationLog(TorchDispatchMode):
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


class OperationRecorder:
    """A `cuda_graphs.GraphRecorder` that repeats each operation on the tensors it was recorded on.

    Results of earlier operations take their new values; all other tensors are read where they are.
    """

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with _OperationLog() as log:
            result = work()

        def replay() -> None:
            new_results: dict[int, Tensor] = {}  # by the id of the recorded result

            def current(value: Any) -> Any:
                return new_results.get(id(value), value) if isinstance(value, Tensor) else value

            for operation, args, kwargs, before in log.done:
                after = operation(*tree.tree_map(current, args), **tree.tree_map(current, kwargs))
                pairs = zip(tree.tree_leaves(before), tree.tree_leaves(after), strict=True)
                new_results |= {id(b): a for b, a in pairs if isinstance(b, Tensor)}
            result.copy_(new_results[id(result)])

        return replay, result
