"""The trials of a search that wait for a replica, and share its passes where they can.

Lives in the pool's process. Knows the thresholds that a running trial must beat, and how many trial
slots there are; nothing about Tune or the study.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

from ray_abliterate.cluster.fleet import ReplicaLife
from ray_abliterate.cluster.leases import Leases
from ray_abliterate.cluster.metrics import PoolMetrics
from ray_abliterate.cluster.replica_call import ReplicaCall
from ray_abliterate.replica.messages import Evaluation, ReplicaApi, TrialSetup
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import Plan

SLOTS_SECONDS = 30.0
"""Trial slots wait for each other at the start, as long as another one comes within this time."""
GATHER_SECONDS = 0.5
"""Plans that may share a pass wait this long for others: about what the sampler needs for a few."""


@dataclass(frozen=True)
class _WaitingTrial:
    """A plan that waits for a replica.

    Attributes:
        plan: The plan.
        setup: The run's setup; a reference, typed as the value that the replica receives.
        per_pass: Plans that may share a pass, this one among them.
        evaluation: Set once the plan was evaluated.
    """

    plan: Plan
    setup: TrialSetup
    per_pass: int
    evaluation: "asyncio.Future[Evaluation]"


class TrialQueue:
    """Evaluates the plans of a search, on whichever replicas are free."""

    def __init__(self, leases: Leases, metrics: PoolMetrics, timeout: float | None) -> None:
        """Have no trial waiting.

        Args:
            leases: Where replicas come from.
            metrics: Told of trials that ended.
            timeout: Seconds that one trial may take; None for any time.
        """
        self._leases, self._metrics, self._timeout = leases, metrics, timeout
        self._waiting: list[_WaitingTrial] = []
        self._in_service = 0
        self._slots, self._missing_slots = 1, 0
        self._thresholds: ThresholdSet | None = None
        self._trial_came, self._slot_came = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin_round(self, slots: int, thresholds: ThresholdSet | None) -> None:
        """Expect so many trial slots; without thresholds no trial is stopped early."""
        self._missing_slots, self._slots, self._thresholds = slots, slots, thresholds

    def add_threshold(self, losses: tuple[float, ...]) -> None:
        """Count the losses of a finished trial from now on, if trials are stopped early at all."""
        if self._thresholds is not None:
            self._thresholds = self._thresholds.including(losses)

    async def wait_for_slots(self) -> None:
        """Add one trial slot; return when all have come, or none has come for a while."""
        self._missing_slots -= 1
        self._slot_came.set()
        while self._missing_slots > 0:
            self._slot_came.clear()
            try:
                await asyncio.wait_for(self._slot_came.wait(), SLOTS_SECONDS)
            except TimeoutError:
                return

    async def evaluate(self, plan: Plan, setup: TrialSetup, per_pass: int) -> Evaluation:
        """Evaluate a plan against the thresholds, in passes shared with other plans.

        Args:
            plan: The plan.
            setup: The run's setup, by reference.
            per_pass: Plans that may share a pass, this one among them; the same for all.

        Raises:
            RayAbliterateError: the plan failed on its replica, or two replicas died over it.
        """
        own = _WaitingTrial(plan, setup, per_pass, asyncio.get_running_loop().create_future())
        self._waiting.append(own)
        self._trial_came.set()
        if per_pass == 1 or len(self._waiting) == 1:
            self._run(self._serve())
        try:
            evaluation = await own.evaluation
        except BaseException:
            self._metrics.trial_failed()
            raise
        self._metrics.trial_scored(evaluation.tokens, evaluation.scorecard.pruned)
        return evaluation

    async def _serve(self) -> None:
        """Lease one replica, and give it as many of the waiting plans as share a pass."""
        try:
            replica = await self._leases.lease()
        except Exception as error:  # noqa: BLE001  # raised to every caller
            abandoned, self._waiting = self._waiting, []
            for trial in abandoned:
                trial.evaluation.set_exception(error)
            return
        await self._gather()
        if not self._waiting:
            self._leases.give_back(replica)
            return
        per_pass = self._waiting[0].per_pass
        group, self._waiting = self._waiting[:per_pass], self._waiting[per_pass:]
        self._in_service += len(group)
        if self._waiting:
            self._run(self._serve())
        results: list[Evaluation | BaseException]
        try:
            results, replica = await self._evaluate(group, replica)
        except BaseException as error:  # noqa: BLE001  # raised to every caller
            results = [error] * len(group)
        self._in_service -= len(group)
        for trial, result in zip(group, results, strict=True):
            if isinstance(result, BaseException):
                trial.evaluation.set_exception(result)
            else:
                trial.evaluation.set_result(replace(result, replica=replica.label))

    async def _evaluate(
        self, group: list[_WaitingTrial], replica: ReplicaLife
    ) -> tuple[list[Evaluation | BaseException], ReplicaLife]:
        """Return what came of each plan, and the replica that evaluated them all."""
        setup, thresholds = group[0].setup, self._thresholds
        timeout = self._timeout * len(group) if self._timeout is not None else None
        if len(group) == 1:
            one = ReplicaCall.of(ReplicaApi.evaluate, group[0].plan, setup, thresholds)
            evaluation, replica = await self._leases.call_leased(replica, one, timeout)
            return [evaluation], replica
        plans = [trial.plan for trial in group]
        several = ReplicaCall.of(ReplicaApi.evaluate_in_shared_passes, plans, setup, thresholds)
        results, replica = await self._leases.call_leased(replica, several, timeout)
        return list(results), replica

    async def _gather(self) -> None:
        """Wait until a pass is full, or all trials wait or are in service, or for a moment."""
        end = asyncio.get_running_loop().time() + GATHER_SECONDS
        while self._waiting and len(self._waiting) < min(
            self._waiting[0].per_pass, self._slots - self._in_service
        ):
            self._trial_came.clear()
            seconds = end - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._trial_came.wait(), max(seconds, 0))
            except TimeoutError:
                return

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
