"""The object store: values put, fetched, and worked on where they lie."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from ray_abliterate.cluster.remote_errors import unwrap

Key = TypeVar("Key", bound=Hashable)


class ObjectStore:
    """Ray's object store, as the driver sees it."""

    def put(self, value: Any) -> Any:
        """A reference to a value."""
        return ray.put(value)

    def fetch(self, reference: Any) -> Any:
        """The value; None if it was lost with its node."""
        try:
            return unwrap(reference)
        except ObjectLostError:
            return None
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                return None
            raise

    def each(
        self, function: Callable[..., Any], references: Mapping[Key, Any], *args: Any
    ) -> Iterator[tuple[Key, Any]]:
        """`function(value, *args)` for each value, in a task on the node that has the value.

        Yields:
            Key and result as they come; None where the value was lost.
        """
        waiting, running = deque(references.items()), dict[Any, Key]()
        shared = [ray.put(arg) for arg in args]
        # a task takes no CPU, all of which the replicas may hold, so nothing else bounds them
        window = max(2, sum(node["Alive"] for node in ray.nodes()))
        while waiting or running:
            while waiting and len(running) < window:
                key, reference = waiting.popleft()
                running[_apply.remote(function, reference, *shared)] = key
            (done,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), self.fetch(done)


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _apply(function: Callable[..., Any], value: Any, *args: Any) -> Any:
    return function(value, *args)
