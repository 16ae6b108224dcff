"""Records operations on tensors on any device, as a GPU's graphs do: what Python decides between
them is not done again, and every number that it has read is the one of the recording."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode


class CannotBeRecorded(RuntimeError):
    """The work reads a value, which a recording can't."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise CannotBeRecorded("a value is read")
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result


class Recordings:
    """A `recorded_steps.Recorder`; counts what it made and how often that was replayed."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with _Operations() as operations:
            result = work()
        self.made += 1

        def replay() -> None:
            self.replayed += 1
            again: dict[int, Tensor] = {}

            def now(value: Any) -> Any:
                return again.get(id(value), value) if isinstance(value, Tensor) else value

            for operation, args, kwargs, before in operations.done:
                after = operation(*tree.tree_map(now, args), **tree.tree_map(now, kwargs))
                pairs = zip(tree.tree_leaves(before), tree.tree_leaves(after), strict=True)
                again |= {id(b): a for b, a in pairs if isinstance(b, Tensor)}
            result.copy_(again[id(result)])

        return replay, result
