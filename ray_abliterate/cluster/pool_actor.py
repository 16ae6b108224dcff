"""The pool's own process: an actor that leases replicas to calls, and survives their deaths.

Work of a replica that dies goes to another at once; it fails only when it has killed two that were
alive when they got it, or no replica can be had. Imports no torch.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from ray_abliterate.cluster.events import EventLog
from ray_abliterate.cluster.fleet import Fleet
from ray_abliterate.cluster.leases import Leases
from ray_abliterate.cluster.metrics import PoolMetrics
from ray_abliterate.cluster.node_store import NodeStoreRegister
from ray_abliterate.cluster.placement import ReplicaLayout
from ray_abliterate.cluster.replica_actor import ReplicaSpec
from ray_abliterate.cluster.replica_call import ReplicaCall, Returned
from ray_abliterate.cluster.trial_queue import TrialQueue
from ray_abliterate.replica.messages import Evaluation, ModelFacts
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import Plan


class PoolActor:
    """What driver and trial slots ask of the pool; each method is called from another process."""

    def __init__(self, spec: ReplicaSpec, timeout_seconds: float | None) -> None:
        """Start nothing yet.

        Args:
            spec: What replicas are made from.
            timeout_seconds: A trial that takes longer fails, and its replica with it.
        """
        self._role = spec.role
        self._events, self._metrics = EventLog(), PoolMetrics(spec.role)
        self._register = NodeStoreRegister()
        self._leases = Leases(self._events, self._metrics, timeout_seconds)
        self._trials = TrialQueue(self._leases, self._metrics, timeout_seconds)
        self._fleet = Fleet(
            spec, self._leases.give_back, self._register.forget, self._events.report
        )
        self._leases.attach(self._fleet)
        self._opened = False
        self._answers: dict[str, tuple[dict[str, Any], ...]] = {}

    def __repr__(self) -> str:
        return f"{self._role}-pool"

    # The fleet

    def _open(self) -> None:
        """Start the fleet; Ray may have restarted this process, so every call makes sure of it."""
        if not self._opened:
            self._opened = True
            self._fleet.start()

    async def open(self) -> tuple[ModelFacts, ReplicaLayout]:
        """Start the fleet; return facts about the model as soon as one replica can be used.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
        """
        self._open()
        while self._fleet.facts is None:
            await self._wait_for_change()
        return self._fleet.facts, self._fleet.layout

    async def news(self, seen: int, patience: float) -> tuple[list[dict[str, Any]], int, int]:
        """Return events after the first `seen`, their count, and the number of ready replicas.

        Waits for one of them to change, at most `patience` seconds.
        """
        before, seen = self._fleet.ready, min(seen, len(self._events))
        end = time.monotonic() + patience
        while len(self._events) <= seen and self._fleet.ready == before and time.monotonic() < end:
            await asyncio.sleep(0.2)
        self._metrics.publish(self._fleet.ready)
        return self._events.since(seen), len(self._events), self._fleet.ready

    async def _wait_for_change(self) -> None:
        """Wait for something to change in the fleet.

        Raises:
            RayAbliterateError: no replica is left, and none will come.
        """
        if self._fleet.failure is not None:
            raise self._fleet.failure
        self._fleet.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._fleet.changed.wait(), 1.0)

    # Calls

    async def call(self, call: ReplicaCall[Returned]) -> Returned:
        """Make a call on a free replica; on its death, on another one."""
        self._open()
        return (await self._leases.call(call))[0]

    async def call_by_reference(self, call: ReplicaCall[Any]) -> list[Any]:
        """Make a call whose result is large; return a reference to it, in a list.

        The result stays on the replica's node, and outlives the replica.
        """
        self._open()
        return [await self._leases.call_by_reference(call)]

    async def stream(self, call: ReplicaCall[Any]) -> AsyncIterator[Any]:
        """Yield what a method of a free replica yields; see `Leases.stream`."""
        self._open()
        async for item in self._leases.stream(call):
            yield item

    async def claim(self, node: str, key: str, stale: list[Any]) -> Any:
        """Return what a node's replicas share; see `NodeStoreRegister.claim`."""
        return await self._register.claim(node, key, stale)

    async def provide(self, node: str, key: str, reference: list[Any]) -> None:
        """Register what a node's replicas share; see `NodeStoreRegister.provide`."""
        self._register.provide(node, key, reference)

    # Trials

    async def evaluate_trial(self, plan: Plan, setup: list[Any], per_pass: int = 1) -> Evaluation:
        """Evaluate a plan of the search; see `TrialQueue.evaluate`.

        Args:
            plan: The plan.
            setup: One reference, in a list so that Ray does not resolve it here.
            per_pass: Plans that may share a pass, this one among them; the same for all.
        """
        self._open()
        return await self._trials.evaluate(plan, setup[0], per_pass)

    async def begin_round(self, slots: int, thresholds: ThresholdSet | None) -> None:
        """Begin a round of a search; see `TrialQueue.begin_round`."""
        self._trials.begin_round(slots, thresholds)

    async def add_threshold(self, losses: tuple[float, ...]) -> None:
        """Count the losses of a trial that is finished and in the journal.

        Not when its evaluation ends: a driver that dies in between would lose the trial, and keep
        those that it stopped.
        """
        self._trials.add_threshold(losses)

    async def wait_for_slots(self) -> None:
        """Add one trial slot, and wait for the others; see `TrialQueue.wait_for_slots`."""
        await self._trials.wait_for_slots()

    async def store_answers(self, trial: str, answers: tuple[dict[str, Any], ...]) -> None:
        """Store the recorded answers of a Tune trial until the driver takes them."""
        self._answers[trial] = answers

    async def take_answers(self, trial: str) -> tuple[dict[str, Any], ...]:
        """Return the stored answers of a Tune trial, and forget them; empty if there are none."""
        return self._answers.pop(trial, ())
