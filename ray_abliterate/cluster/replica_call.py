"""A call of a replica's method, as it travels from the driver through the pool to a replica."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, TypeVarTuple

from ray_abliterate.replica.messages import ReplicaApi

Returned = TypeVar("Returned")
Parameters = ParamSpec("Parameters")
Arguments = TypeVarTuple("Arguments")
"""For calls whose arguments come as tuples."""


@dataclass(frozen=True)
class ReplicaCall(Generic[Returned]):
    """A method of `ReplicaApi` by its name, and what it is called with.

    Attributes:
        method: Name of the method.
        args: Positional arguments, references to stored values among them.
        options: Keyword arguments.
    """

    method: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: Callable[Concatenate[ReplicaApi, Parameters], Returned],
        *args: Parameters.args,
        **options: Parameters.kwargs,
    ) -> "ReplicaCall[Returned]":
        """Call `method`, such as `ReplicaApi.tune`, with these arguments."""
        return ReplicaCall(method.__name__, args, options)
