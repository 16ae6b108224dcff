"""What the replicas of one node share: read-only arrays, one copy in the node's object store."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from ray_abliterate.cluster.placement import Placement

CLAIM_SECONDS = 120.0
"""The replica that is to make an array has so long; then the next one is asked."""

Arrays = Mapping[str, Any]
"""Read-only arrays by name."""


class NodeStore:
    """A replica's access to the arrays that its node holds."""

    def __init__(self, placement: Placement) -> None:
        self._pool, self._node = placement.pool, placement.node

    def share(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """Return the node's arrays under a key; make them if no other replica has.

        The arrays are mapped, not copied, and read-only: writing to one through torch would change
        what all replicas of the node read.
        """
        stale: list[Any] = []
        while True:
            # a reference in a list, which Ray does not resolve on the way
            reference = ray.get(self._pool.claim.remote(self._node, key, stale))
            if reference is None:
                reference = [ray.put(dict(make()))]
                ray.get(self._pool.provide.remote(self._node, key, reference))
            try:
                arrays: Arrays = ray.get(reference[0])
            except ObjectLostError:
                stale = reference  # its maker died; replicas that had mapped it go on reading
                continue
            return arrays


class NodeStoreRegister:
    """The pool's register of what each node holds; the replica that asks first makes it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Any] = {}
        self._claimed: dict[tuple[str, str], asyncio.Event] = {}

    async def claim(self, node: str, key: str, stale: list[Any]) -> Any:
        """Return a reference in a list; None if the caller is to make the arrays.

        Args:
            node: Id of the node.
            key: Name of the arrays.
            stale: The reference that could not be read, in a list; empty on the first try.
        """
        if stale and self._held.get((node, key)) == stale:
            del self._held[node, key], self._claimed[node, key]
        while (node, key) not in self._held:
            if (node, key) not in self._claimed:
                self._claimed[node, key] = asyncio.Event()
                return None
            waiting = self._claimed[node, key]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiting.wait(), CLAIM_SECONDS)
            if not waiting.is_set() and self._claimed.get((node, key)) is waiting:
                del self._claimed[node, key]
        return self._held[node, key]

    def provide(self, node: str, key: str, reference: list[Any]) -> None:
        """Register the arrays that a node holds now, and wake those who wait for them."""
        self._held[node, key] = reference
        self._claimed.setdefault((node, key), asyncio.Event()).set()

    def forget(self, node: str) -> None:
        """Forget what a node held that is gone."""
        for register in (self._held, self._claimed):
            for entry in [entry for entry in register if entry[0] == node]:
                del register[entry]
