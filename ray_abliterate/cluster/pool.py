"""The replica pool: leases replicas to calls, and survives their deaths.

The pool owns every lease, so a caller that dies can't leak one. Work of a replica that dies goes to
another at once; it fails only when it has killed two that were alive when they got it, or no
replica can be had.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.connection import ours
from ray_abliterate.cluster.errors import DEATHS, death, unwrap
from ray_abliterate.cluster.events import Events
from ray_abliterate.cluster.fleet import Fleet, Member
from ray_abliterate.cluster.host import Hosting, ReplicaHost
from ray_abliterate.cluster.layout import Layout
from ray_abliterate.cluster.metrics import PoolMetrics
from ray_abliterate.cluster.node_store import Claims
from ray_abliterate.cluster.secrets import drivers_secrets
from ray_abliterate.cluster.store import ObjectStore
from ray_abliterate.dominance import Bar
from ray_abliterate.errors import SearchError
from ray_abliterate.evaluation import Evaluation
from ray_abliterate.prompts import PromptSet
from ray_abliterate.recipe import Recipe

NO_REPLICA_SECONDS = 900.0
"""A call waits this long for any replica; a new one has to load its model."""
SLOTS_SECONDS = 60.0
"""Trial slots wait this long for each other at the start."""
GATHER_SECONDS = 0.5
"""Plans that may share a pass wait this long for others: about what the sampler needs for a few."""
NEWS_SECONDS = 1.0
"""How often the driver hears from the pool if nothing happens."""

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Waiting:
    """A plan that waits for a replica."""

    plan: Any
    setup: list[Any]
    result: "asyncio.Future[Evaluation]"


class PoolActor:
    """Hands calls to free replicas, in the order they come."""

    def __init__(
        self, hosting: Hosting, timeout_seconds: float | None, trials_per_pass: int = 1
    ) -> None:
        self._timeout = timeout_seconds
        self._per_pass = trials_per_pass
        self._free: asyncio.Queue[Member] = asyncio.Queue()
        self._events = Events()
        self._metrics = PoolMetrics()
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
        self._slots_there = asyncio.Event()

    def __repr__(self) -> str:
        return "replica-pool"

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
    ) -> Any:
        """Run a method on a leased replica, and give it back; on its death, on another one."""
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
                return result
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
        return await self._run(await self._lease(), method, args)

    async def call_by_reference(self, method: str, args: list[Any]) -> list[Any]:
        """The same for large results: a reference in a list. They stay on the replica's node, and
        outlive the replica."""
        found = await self._run(await self._lease(), method, args, by_reference=True)
        return [found]

    async def claim(self, node: str, key: str, stale: list[Any]) -> Any:
        """What a node's replicas share, see `Claims.claim`."""
        return await self._claims.claim(node, key, stale)

    async def provide(self, node: str, key: str, reference: list[Any]) -> None:
        """Hold what a node's replicas share."""
        self._claims.provide(node, key, reference)

    # Trials

    async def trial(self, plan: Any, setup: list[Any]) -> Evaluation:
        """Evaluate a plan of the search: against the bar, in passes shared with other plans.

        Args:
            plan: The plan.
            setup: One reference, in a list so that it is not resolved here.
        """
        own = _Waiting(plan, setup, asyncio.get_running_loop().create_future())
        self._waiting.append(own)
        self._changed.set()
        if self._per_pass == 1 or len(self._waiting) == 1:
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
        group = self._waiting[: self._per_pass]
        self._waiting = self._waiting[self._per_pass :]
        if not group:
            self._give_back(member)
            return
        self._in_service += len(group)
        if self._waiting:
            self._start(self._hand_out())
        plans, setup = [waiting.plan for waiting in group], group[0].setup[0]
        timeout = self._timeout * len(group) if self._timeout is not None else None
        try:
            if len(group) == 1:
                args = [plans[0], setup, self._bar]
                found = [await self._run(member, "evaluate", args, timeout)]
            else:
                args = [plans, setup, self._bar]
                found = await self._run(member, "evaluate_together", args, timeout)
        except BaseException as error:  # noqa: BLE001  # every caller is told
            found = [error] * len(group)
        self._in_service -= len(group)
        for waiting, result in zip(group, found, strict=True):
            if isinstance(result, BaseException):
                waiting.result.set_exception(result)
            else:
                waiting.result.set_result(result)

    async def _gather(self) -> None:
        """Wait until a pass is full, or all trials are here or in service, or for a moment."""
        end = asyncio.get_running_loop().time() + GATHER_SECONDS
        while len(self._waiting) < min(self._per_pass, self._slots - self._in_service):
            self._changed.clear()
            left = end - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._changed.wait(), max(left, 0))
            except TimeoutError:
                return

    async def expect(self, slots: int, bar: Bar | None) -> None:
        """A search begins with so many trial slots, and a bar; without, no trial is stopped."""
        self._missing_slots, self._slots, self._bar = slots, slots, bar
        self._slots_there.clear()

    async def raise_bar(self, mark: tuple[float, ...]) -> None:
        """A trial is finished and in the journal: its losses count from now on, if there is a bar.

        Not when its evaluation ends: a driver that dies in between would lose the trial, and keep
        those that it stopped.
        """
        self._bar = self._bar.raised(mark) if self._bar is not None else None

    async def join(self) -> None:
        """A trial slot is there; returns when all are, or after a while."""
        self._missing_slots -= 1
        if self._missing_slots <= 0:
            self._slots_there.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._slots_there.wait(), SLOTS_SECONDS)

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


class ReplicaPool:
    """The driver's side of the pool."""

    def __init__(self, actor: Any, on_event: OnEvent) -> None:
        """Listen to a pool that was made; `open` it before use."""
        self.actor = actor
        self.facts: Any = None
        """`ModelFacts` of the first replica."""
        self.store = ObjectStore()
        self.layout: Layout
        self.replicas = 0
        """Those that can be used now, as of a moment ago."""
        self._on_event = on_event
        self._closed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="pool-news", daemon=True)

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        source: str,
        prompts: Mapping[str, PromptSet],
        on_event: OnEvent = lambda event: None,
    ) -> contextlib.AbstractContextManager["ReplicaPool"]:
        """A pool of real replicas, see `of`."""
        args = (recipe, source, prompts, drivers_secrets())
        hosting = Hosting(ReplicaHost, args, recipe.model, patient=not ours())
        search = recipe.search
        return cls.of(hosting, search.trial_timeout_seconds, search.trials_per_pass, on_event)

    @classmethod
    @contextmanager
    def of(
        cls,
        hosting: Hosting,
        timeout_seconds: float | None = None,
        trials_per_pass: int = 1,
        on_event: OnEvent = lambda event: None,
    ) -> Iterator["ReplicaPool"]:
        """Start replicas on all nodes and wait for the first; all are gone after the block.

        Args:
            hosting: What replicas are made from.
            timeout_seconds: A trial that takes longer fails, and its replica with it.
            trials_per_pass: Plans that a replica gets at once.
            on_event: Told what happens to the fleet, in a thread of its own.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = (
            ray.remote(PoolActor)
            .options(
                name=f"replica-pool {secrets.token_hex(2)}",
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
            )
            .remote(hosting, timeout_seconds, trials_per_pass)
        )
        pool = cls(actor, on_event)
        try:
            pool._listener.start()
            pool.facts, pool.layout = unwrap(actor.open.remote())
            yield pool
        finally:
            pool._closed.set()
            ray.kill(actor)
            pool._listener.join(5.0)

    def _listen(self) -> None:
        """Hear what happens until the block ends."""
        seen, news = 0, self.actor.news.options(max_task_retries=0)
        while not self._closed.is_set():
            try:
                events, seen, self.replicas = ray.get(news.remote(seen, NEWS_SECONDS))
            except (RayError, RuntimeError, ConnectionError):
                self._closed.wait(NEWS_SECONDS)  # gone, or being started again
                continue
            for event in events:
                self._on_event(event)

    def put(self, setup: Any) -> Any:
        """A reference to what all evaluations share."""
        return ray.put(setup)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of any replica, and wait."""
        return unwrap(self.actor.call.remote(method, list(args)))

    def evaluate(self, plan: Any, setup: Any) -> Evaluation:
        """Evaluate one plan, outside of a search."""
        evaluation: Evaluation = self.call("evaluate", plan, setup)
        return evaluation

    def map_by_reference(
        self, method: str, calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Call a method once per argument tuple: its number and a reference, as they come."""
        waiting = {
            self.actor.call_by_reference.remote(method, list(args)): number
            for number, args in enumerate(calls)
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready[0]), unwrap(ready[0])[0]

    def map(
        self, method: str, calls: Iterable[tuple[Any, ...]], most_out: int | None = None
    ) -> Iterator[Any]:
        """Call a method once per argument tuple; results as they come.

        Args:
            method: Of the replicas.
            calls: Arguments; read only as calls are made.
            most_out: Calls that are out at once; all of them if unset.
        """
        left, waiting = iter(calls), list[Any]()
        while True:
            more = islice(left, None if most_out is None else most_out - len(waiting))
            waiting += [self.actor.call.remote(method, list(args)) for args in more]
            if not waiting:
                return
            ready, waiting = ray.wait(waiting, num_returns=1)
            yield unwrap(ready[0])
