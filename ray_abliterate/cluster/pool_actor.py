"""The pool's own process: leases replicas to calls, and survives their deaths.

The pool owns every lease, so a caller that dies can't leak one. Work of a replica that dies goes to
another at once; it fails only when it has killed two that were alive when they got it, or no
replica can be had.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from ray_abliterate.cluster.events import Events
from ray_abliterate.cluster.fleet import Fleet, Member
from ray_abliterate.cluster.metrics import PoolMetrics
from ray_abliterate.cluster.node_store import Claims
from ray_abliterate.cluster.placement import Layout
from ray_abliterate.cluster.remote_errors import DEATHS, ReplicaDied, death
from ray_abliterate.cluster.replica_actor import Hosting
from ray_abliterate.errors import SearchError
from ray_abliterate.replica.messages import Evaluation
from ray_abliterate.search.dominance import Bar

NO_REPLICA_SECONDS = 900.0
"""A call waits this long for any replica; a new one has to load its model."""
SLOTS_SECONDS = 30.0
"""Trial slots wait for each other at the start, as long as another one comes within this time."""
AHEAD = 2
"""Items that a replica that yields may be ahead of who takes them."""
GATHER_SECONDS = 0.5
"""Plans that may share a pass wait this long for others: about what the sampler needs for a few."""


@dataclass(frozen=True)
class _Waiting:
    """A plan that waits for a replica."""

    plan: Any
    setup: list[Any]
    together: int
    result: "asyncio.Future[Evaluation]"


class PoolActor:
    """Hands calls to free replicas, in the order they come."""

    def __init__(self, hosting: Hosting, timeout_seconds: float | None) -> None:
        self._timeout = timeout_seconds
        self._free: asyncio.Queue[Member] = asyncio.Queue()
        self._events = Events()
        self._metrics = PoolMetrics(hosting.role)
        self._role = hosting.role
        self._opened = False
        self._claims = Claims()
        self._fleet = Fleet(hosting, self._free.put_nowait, self._claims.forget, self._events.tell)
        self._waiting: list[_Waiting] = []
        self._in_service = 0
        self._slots = 1
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: dict[str, Any] = {}
        self._bar: Bar | None = None
        self._missing_slots = 0
        self._slot_came = asyncio.Event()

    def __repr__(self) -> str:
        return f"{self._role}-pool"

    # The fleet

    def _open(self) -> None:
        """Start the fleet, also in a process that Ray started anew."""
        if not self._opened:
            self._opened = True
            self._fleet.start()

    async def open(self) -> tuple[Any, Layout]:
        """Start the fleet; facts about the model as soon as one replica can be used.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
        """
        self._open()
        while self._fleet.facts is None:
            await self._hope()
        return self._fleet.facts, self._fleet.layout

    async def news(self, seen: int, patience: float) -> tuple[list[dict[str, Any]], int, int]:
        """Events after the first `seen`, their count, and how many replicas can be used now.

        Waits for one of them to change, at most so many seconds.
        """
        before, seen = self._fleet.ready, min(seen, len(self._events))
        end = time.monotonic() + patience
        while len(self._events) <= seen and self._fleet.ready == before and time.monotonic() < end:
            await asyncio.sleep(0.2)
        self._metrics.publish(self._fleet.ready)
        return self._events.since(seen), len(self._events), self._fleet.ready

    async def _hope(self) -> None:
        """Wait for something to change in the fleet.

        Raises:
            RayAbliterateError: no replica is left, and none will come.
        """
        if self._fleet.failure is not None:
            raise self._fleet.failure
        self._fleet.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._fleet.changed.wait(), 1.0)

    async def _lease(self) -> Member:
        """A free replica that is alive.

        Raises:
            SearchError: none was free for a long time.
        """
        self._open()
        end = time.monotonic() + NO_REPLICA_SECONDS
        while time.monotonic() < end:
            member = await self._next_free(end)
            try:
                await _ready(member.handle.__ray_ready__.remote())
            except DEATHS as error:
                self._fleet.lost(member, death(error))
                continue
            if not member.gone:
                return member
        raise SearchError(f"no replica was free for {NO_REPLICA_SECONDS:g} seconds")

    async def _next_free(self, end: float) -> Member:
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._free.get(), 1.0)
            if self._fleet.failure is not None:
                raise self._fleet.failure
        raise SearchError(f"no replica was free for {NO_REPLICA_SECONDS:g} seconds")

    async def _run(
        self,
        member: Member,
        method: str,
        args: list[Any],
        timeout: float | None = None,
        by_reference: bool = False,
    ) -> tuple[Any, Member]:
        """Run a method on a leased replica, and give it back; on its death, on another one.

        Returns:
            What came of it, and which replica it came from.
        """
        deaths = 0
        while True:
            self._metrics.begins()
            try:
                result = await asyncio.wait_for(
                    _called(member.handle, method, args, by_reference), timeout
                )
            except TimeoutError:
                why = f"no answer within search.trial_timeout_seconds = {self._timeout:g}"
                ray.kill(member.handle)
                self._fleet.lost(member, why)
                raise SearchError(f"{why}; the replica was started anew") from None
            except DEATHS as error:
                self._fleet.lost(member, death(error))
                deaths += 1
                if deaths == 2:
                    raise SearchError(
                        f"two replicas died over this call ({type(error).__name__}); out of memory?"
                    ) from None
                self._events.tell("call-moved", method=method, dead=member.label)
                self._metrics.moved()
            except BaseException:
                self._give_back(member)
                raise
            else:
                self._give_back(member)
                return result, member
            finally:
                self._metrics.ends()
            member = await self._lease()

    def _give_back(self, member: Member) -> None:
        if not member.gone:
            self._free.put_nowait(member)

    async def call(self, method: str, args: list[Any]) -> Any:
        """Run a method on a free replica; on its death, on another one.

        Args:
            method: Name of a method of `Replica`.
            args: Its arguments, object references among them.
        """
        return (await self._run(await self._lease(), method, args))[0]

    async def call_by_reference(self, method: str, args: list[Any]) -> list[Any]:
        """The same for large results: a reference in a list. They stay on the replica's node, and
        outlive the replica."""
        found, _ = await self._run(await self._lease(), method, args, by_reference=True)
        return [found]

    async def stream(self, method: str, args: list[Any]) -> AsyncIterator[Any]:
        """What a method of a free replica yields, item by item; the replica is little ahead.

        Args:
            method: Name of a method of `Replica` that yields.
            args: Its arguments, object references among them.

        Raises:
            ReplicaDied: after some items, or none.
        """
        member = await self._lease()
        self._metrics.begins()
        items = member.handle.stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=AHEAD
        ).remote(method, *args)
        try:
            async for reference in items:
                yield await reference
        except DEATHS as error:
            self._fleet.lost(member, death(error))
            self._events.tell("call-moved", method=method, dead=member.label)
            self._metrics.moved()
            raise ReplicaDied(
                f"{member.label}: {death(error)}, twice over the same piece"
            ) from None
        finally:
            self._metrics.ends()
            self._give_back(member)

    async def claim(self, node: str, key: str, stale: list[Any]) -> Any:
        """What a node's replicas share, see `Claims.claim`."""
        return await self._claims.claim(node, key, stale)

    async def provide(self, node: str, key: str, reference: list[Any]) -> None:
        """Hold what a node's replicas share."""
        self._claims.provide(node, key, reference)

    # Trials

    async def trial(self, plan: Any, setup: list[Any], together: int = 1) -> Evaluation:
        """Evaluate a plan of the search: against the bar, in passes shared with other plans.

        Args:
            plan: The plan.
            setup: One reference, in a list so that it is not resolved here.
            together: Plans that may share a pass, this one among them; the same for all.
        """
        own = _Waiting(plan, setup, together, asyncio.get_running_loop().create_future())
        self._waiting.append(own)
        self._changed.set()
        if together == 1 or len(self._waiting) == 1:
            self._start(self._hand_out())
        try:
            found = await own.result
        except BaseException:
            self._metrics.failed_trial()
            raise
        self._metrics.trial(found.tokens, found.scorecard.bounded)
        return found

    async def _hand_out(self) -> None:
        """Give one replica as many of the waiting plans as share a pass."""
        try:
            member = await self._lease()
        except Exception as error:  # noqa: BLE001  # every caller is told
            left, self._waiting = self._waiting, []
            for own in left:
                own.result.set_exception(error)
            return
        await self._gather()
        if not self._waiting:
            self._give_back(member)
            return
        together = self._waiting[0].together
        group, self._waiting = self._waiting[:together], self._waiting[together:]
        self._in_service += len(group)
        if self._waiting:
            self._start(self._hand_out())
        plans, setup = [waiting.plan for waiting in group], group[0].setup[0]
        timeout = self._timeout * len(group) if self._timeout is not None else None
        try:
            if len(group) == 1:
                args = [plans[0], setup, self._bar]
                one, member = await self._run(member, "evaluate", args, timeout)
                found = [one]
            else:
                args = [plans, setup, self._bar]
                found, member = await self._run(member, "evaluate_together", args, timeout)
        except BaseException as error:  # noqa: BLE001  # every caller is told
            found = [error] * len(group)
        self._in_service -= len(group)
        for waiting, result in zip(group, found, strict=True):
            if isinstance(result, BaseException):
                waiting.result.set_exception(result)
            else:
                waiting.result.set_result(replace(result, replica=member.label))

    async def _gather(self) -> None:
        """Wait until a pass is full, or all trials are here or in service, or for a moment."""
        end = asyncio.get_running_loop().time() + GATHER_SECONDS
        while self._waiting and len(self._waiting) < min(
            self._waiting[0].together, self._slots - self._in_service
        ):
            self._changed.clear()
            left = end - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._changed.wait(), max(left, 0))
            except TimeoutError:
                return

    async def expect(self, slots: int, bar: Bar | None) -> None:
        """A search begins with so many trial slots, and a bar; without, no trial is stopped."""
        self._missing_slots, self._slots, self._bar = slots, slots, bar

    async def raise_bar(self, mark: tuple[float, ...]) -> None:
        """A trial is finished and in the journal: its losses count from now on, if there is a bar.

        Not when its evaluation ends: a driver that dies in between would lose the trial, and keep
        those that it stopped.
        """
        self._bar = self._bar.raised(mark) if self._bar is not None else None

    async def join(self) -> None:
        """A trial slot is there; returns when all are, or none has come for a while."""
        self._missing_slots -= 1
        self._slot_came.set()
        while self._missing_slots > 0:
            self._slot_came.clear()
            try:
                await asyncio.wait_for(self._slot_came.wait(), SLOTS_SECONDS)
            except TimeoutError:
                return

    async def keep(self, key: str, value: Any) -> None:
        """Hold a value until it is taken."""
        self._kept[key] = value

    async def take(self, key: str) -> Any:
        """The held value, given away; None if there is none."""
        return self._kept.pop(key, None)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _ready(reference: Any) -> Any:
    return await reference


async def _called(handle: Any, method: str, args: list[Any], by_reference: bool) -> Any:
    if not by_reference:
        return await handle.call.remote(method, *args)
    done, payload = handle.call_by_reference.options(num_returns=2).remote(method, *args)
    await done
    return payload
