"""Ray's object store: values are put once, fetched, and reduced on the nodes that hold them."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from ray_abliterate.cluster.remote_errors import unwrap

Stored = TypeVar("Stored")
Computed = TypeVar("Computed")
ItemKey = TypeVar("ItemKey", bound=Hashable)
MoreArguments = ParamSpec("MoreArguments")


@dataclass(frozen=True)
class Reference(Generic[Stored]):
    """A reference to a value in the object store.

    Attributes:
        handle: Ray's own reference.
    """

    handle: Any

    @property
    def argument(self) -> Stored:
        """The handle, typed as the value that a called method receives in its place.

        `pool.call(ReplicaApi.evaluate, plan, shared.argument)` sends the handle; Ray puts the value
        there before the replica is called. Only calls may use it: here it is not the value.
        """
        return cast(Stored, self.handle)


class ObjectStore:
    """Ray's object store, as the driver sees it."""

    def put(self, value: Stored) -> Reference[Stored]:
        """Store a value, and return a reference to it."""
        return Reference(ray.put(value))

    def fetch(self, reference: Reference[Stored]) -> Stored | None:
        """Return the value; None if it was lost with its node."""
        try:
            return cast(Stored, unwrap(reference.handle))
        except ObjectLostError:
            return None
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                return None
            raise

    def each(
        self,
        function: Callable[Concatenate[Stored, MoreArguments], Computed],
        references: Mapping[ItemKey, Reference[Stored]],
        *args: MoreArguments.args,
        **options: MoreArguments.kwargs,
    ) -> Iterator[tuple[ItemKey, Computed | None]]:
        """Compute `function(value, *args)` for each value, in a task on the node that holds it.

        Yields:
            Key and result, as they come; None where the value was lost.
        """
        waiting, running = deque(references.items()), dict[Any, ItemKey]()
        shared = [ray.put(arg) for arg in args]
        # a task takes no CPU, all of which the replicas may hold, so nothing else bounds them
        window = max(2, sum(node["Alive"] for node in ray.nodes()))
        while waiting or running:
            while waiting and len(running) < window:
                key, reference = waiting.popleft()
                task = _apply.remote(function, reference.handle, *shared, **options)
                running[task] = key
            (done,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), self.fetch(Reference[Computed](done))


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _apply(function: Callable[..., Any], value: Any, *args: Any, **options: Any) -> Any:
    return function(value, *args, **options)
