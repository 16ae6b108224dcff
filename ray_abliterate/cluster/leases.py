"""Leases: which call has which replica, and what happens to a call whose replica dies.

The pool owns every lease, so a caller that dies can't leak one.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import ray

from ray_abliterate.cluster.events import EventLog
from ray_abliterate.cluster.fleet import Fleet, ReplicaLife
from ray_abliterate.cluster.metrics import PoolMetrics
from ray_abliterate.cluster.remote_errors import DEATHS, ReplicaDied, describe_death
from ray_abliterate.cluster.replica_call import ReplicaCall, Returned
from ray_abliterate.errors import SearchError

NO_REPLICA_SECONDS = 900.0
"""A call waits this long for any replica; a new one has to load its model."""
AHEAD = 2
"""Items that a replica that yields may be ahead of the consumer."""


class Leases:
    """Hands free replicas to calls, in the order in which the calls come."""

    def __init__(self, events: EventLog, metrics: PoolMetrics, timeout: float | None) -> None:
        """Have no replica to lease yet.

        Args:
            events: Told which call moved from a dead replica to another one.
            metrics: Told how busy replicas are.
            timeout: The recipe's `search.trial_timeout_seconds`, for messages.
        """
        self._events, self._metrics, self._timeout = events, metrics, timeout
        self._free: asyncio.Queue[ReplicaLife] = asyncio.Queue()
        self._fleet: Fleet

    def attach(self, fleet: Fleet) -> None:
        """Lease this fleet's replicas, and report their deaths to it."""
        self._fleet = fleet

    def give_back(self, replica: ReplicaLife) -> None:
        """Make a replica free, be it new or the end of a lease; not if it is gone."""
        if not replica.gone:
            self._free.put_nowait(replica)

    async def lease(self) -> ReplicaLife:
        """Return a free replica that is alive; `give_back` ends the lease.

        Raises:
            SearchError: none was free for a long time.
            RayAbliterateError: no replica is left, and none will come.
        """
        end = time.monotonic() + NO_REPLICA_SECONDS
        while time.monotonic() < end:
            replica = await self._next_free(end)
            try:
                await _result(replica.handle.__ray_ready__.remote())
            except DEATHS as error:
                self._fleet.lost(replica, describe_death(error))
                continue
            if not replica.gone:
                return replica
        raise _none_free()

    async def _next_free(self, end: float) -> ReplicaLife:
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._free.get(), 1.0)
            if self._fleet.failure is not None:
                raise self._fleet.failure
        raise _none_free()

    async def call(
        self, call: ReplicaCall[Returned], timeout: float | None = None
    ) -> tuple[Returned, ReplicaLife]:
        """Lease a replica for a call; see `call_leased`."""
        return await self.call_leased(await self.lease(), call, timeout)

    async def call_by_reference(self, call: ReplicaCall[Any]) -> Any:
        """Make a call, and return a reference to its result, which stays on the replica's node."""
        reference, _ = await self.call_leased(await self.lease(), call, by_reference=True)
        return reference

    async def call_leased(
        self,
        replica: ReplicaLife,
        call: ReplicaCall[Returned],
        timeout: float | None = None,
        by_reference: bool = False,
    ) -> tuple[Returned, ReplicaLife]:
        """Call a method of a leased replica, and end the lease; on its death, call another one.

        Returns:
            The result (a reference to it if `by_reference`), and the replica it came from.

        Raises:
            SearchError: two replicas died over the call, or it took longer than `timeout` seconds.
        """
        deaths = 0
        while True:
            self._metrics.work_began()
            try:
                work = _call(replica.handle, call, by_reference)
                result = await asyncio.wait_for(work, timeout)
            except TimeoutError:
                why = f"no answer within search.trial_timeout_seconds = {self._timeout:g}"
                ray.kill(replica.handle)
                self._fleet.lost(replica, why)
                raise SearchError(f"{why}; the replica was restarted") from None
            except DEATHS as error:
                self._fleet.lost(replica, describe_death(error))
                deaths += 1
                if deaths == 2:
                    raise SearchError(
                        f"two replicas died over this call ({type(error).__name__}); out of memory?"
                    ) from None
                self._report_moved(call, replica)
            except BaseException:
                self.give_back(replica)
                raise
            else:
                self.give_back(replica)
                return result, replica
            finally:
                self._metrics.work_ended()
            replica = await self.lease()

    async def stream(self, call: ReplicaCall[Any]) -> AsyncIterator[Any]:
        """Yield what a method of a free replica yields; the replica is at most `AHEAD` items ahead.

        Raises:
            ReplicaDied: the replica died, after some items or none.
        """
        replica = await self.lease()
        self._metrics.work_began()
        items = replica.handle.stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=AHEAD
        ).remote(call.method, *call.args, **call.options)
        try:
            async for reference in items:
                yield await reference
        except DEATHS as error:
            self._fleet.lost(replica, describe_death(error))
            self._report_moved(call, replica)
            raise ReplicaDied(
                f"{replica.label}: {describe_death(error)}, twice over the same piece"
            ) from None
        finally:
            self._metrics.work_ended()
            self.give_back(replica)

    def _report_moved(self, call: ReplicaCall[Any], replica: ReplicaLife) -> None:
        self._events.report("call-moved", method=call.method, dead=replica.label)
        self._metrics.call_moved()


def _none_free() -> SearchError:
    return SearchError(f"no replica was free for {NO_REPLICA_SECONDS:g} seconds")


async def _result(reference: Any) -> Any:
    return await reference


async def _call(handle: Any, call: ReplicaCall[Any], by_reference: bool) -> Any:
    if not by_reference:
        return await handle.call.remote(call.method, *call.args, **call.options)
    two_returns = handle.call_by_reference.options(num_returns=2)
    done, payload = two_returns.remote(call.method, *call.args, **call.options)
    await done
    return payload
