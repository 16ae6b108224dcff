"""Stand-ins for the process that a replica lives in: they score plans at once, or misbehave."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from ray_abliterate.cluster.node_store import NodeStore
from ray_abliterate.cluster.placement import Placement
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.replica_actor import ReplicaProcess, ReplicaSpec
from ray_abliterate.cluster.replica_call import ReplicaCall
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.early_stopping import score_all
from ray_abliterate.recipe import ModelSettings, SpaceSettings
from ray_abliterate.replica.messages import Evaluation, ModelFacts
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard
from ray_abliterate.search.space import SearchSpace

GOALS = [("rate", "minimize"), ("kl", "minimize")]
SHAPE = ModelShape(8, 32, ("attn", "mlp"))
SPACE = SearchSpace.of(SHAPE, SpaceSettings(), "none")
FACTS = ModelFacts(SHAPE, 2, 10, 0, 0, "float32", "cpu", "stand-in", None)


class StandInReplica(ReplicaProcess):
    """Scores a plan by its peak; `folder` counts passes and holds switches."""

    def __init__(self, placement: Placement, folder: str, seconds: float = 0.0) -> None:
        self.placement = placement
        self.folder, self.seconds = Path(folder), seconds

    def _once(self, name: str) -> bool:
        """Whether a switch is set; taking it resets it (one process only)."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def describe(self) -> ModelFacts:
        return FACTS

    def echo(self, *values: Any) -> tuple[Any, ...]:
        return values

    def large(self, number: int = 0) -> bytes:
        return bytes(1_000_000)

    def die(self) -> None:
        os._exit(1)

    def fail(self) -> None:
        raise ScoreError("the score is broken")

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def evaluate(self, plan: Plan, setup: Any, thresholds: ThresholdSet | None) -> Evaluation:
        self._begin_pass()
        return self._score(plan)

    def evaluate_in_shared_passes(
        self, plans: Sequence[Plan], setup: Any, thresholds: ThresholdSet | None
    ) -> list[Evaluation | Exception]:
        self._begin_pass()
        return [self._score_or_fail(plan) for plan in plans]

    def _begin_pass(self) -> None:
        time.sleep(self.seconds)
        if self._once("die-once"):
            os._exit(1)
        with (self.folder / "passes").open("a") as file:
            file.write("pass\n")

    def _score_or_fail(self, plan: Plan) -> Evaluation | Exception:
        try:
            return self._score(plan)
        except ScoreError as error:
            return error

    def _score(self, plan: Plan) -> Evaluation:
        if self._once("nan-once"):
            Score("rate", math.nan, 0, 0)
        peak = plan.profiles[0][1].peak
        scores = (Score("rate", 2 - peak, 0, 2), Score("kl", peak, 0, 2))
        return Evaluation(Scorecard(scores), self.seconds)


class CountingReplica(StandInReplica):
    """Yields numbers."""

    def count(self, first: int, stop: int, dies_at: int) -> Iterator[int]:
        """Numbers; where it comes to one number it dies, unless it began there."""
        for number in range(first, stop):
            if number == dies_at and (number != first or not number):
                time.sleep(0.5)  # what was yielded is on its way
                os._exit(1)
            yield number


class JitteryReplica(StandInReplica):
    """Takes its time, never the same."""

    def evaluate(self, plan: Plan, setup: Any, thresholds: ThresholdSet | None) -> Evaluation:
        time.sleep(random.uniform(0, 0.3))
        return super().evaluate(plan, setup, thresholds)


class SharingReplica(StandInReplica):
    """Shares an array with the replicas of its node."""

    def share(self, key: str) -> tuple[int, int, int, bool]:
        mine = numpy.full(100_000, self.placement.index + 1)
        if not hasattr(self, "array"):
            store = NodeStore(self.placement)
            self.array = store.share(key, lambda: {"array": mine})["array"]
        array = self.array
        assert (array == array[0]).all()
        return self.placement.index, os.getpid(), int(array[0]), bool(array.flags.writeable)


class PeakDivergence:
    """A divergence that the first component's peak decides."""

    name, goal, best = "kl", "minimize", 0.0

    def score(self, plan: Any) -> Score:
        peak = plan.profiles[0][1].peak
        return Score("kl", peak, 0, 2)


class PeakRate:
    """A rate that both peaks decide, counted hit by hit, until it is hopeless."""

    name, goal, best = "rate", "minimize", 0.0

    def score_until(self, plan: Any, hopeless: Callable[[float], bool]) -> Score:
        (_, first), (_, second) = plan.profiles
        total = 20
        for hits in range(1, total + 1):
            if hits > total * (1.2 - 0.4 * first.peak - 0.3 * max(second.peak, 0)):
                return Score("rate", (hits - 1) / total, 0, 1)
            if hopeless(hits / total):
                return Score("rate", hits / total, 0, 1, bound=True)
        return Score("rate", 1, 0, 1)

    def score(self, plan: Any) -> Score:
        return self.score_until(plan, lambda _loss: False)

    def prepare(self, plan: Any) -> None: ...


class StoppableReplica(StandInReplica):
    """Scores a plan as replicas do: against the thresholds, which it stores as it gets them."""

    def evaluate(self, plan: Plan, setup: Any, thresholds: ThresholdSet | None) -> Evaluation:
        with (self.folder / "thresholds.jsonl").open("a") as file:
            file.write(json.dumps(thresholds.losses if thresholds is not None else None) + "\n")
        card = score_all((PeakRate(), PeakDivergence()), plan, thresholds)  # type: ignore[arg-type]
        return Evaluation(card, 0.0)


OPEN = ExitStack()
"""Pools of the test that runs."""


def pool_of(
    folder: Path,
    count: int,
    seconds: float = 0.0,
    timeout: float | None = None,
    kind: type[StandInReplica] = StandInReplica,
    events: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> ReplicaPool:
    """A real pool over stand-ins, until the end of the test; all are up."""
    own = {"replicas": count, "gpus_per_replica": 0, "threads_per_replica": 1}
    chosen = {"name": "stand-in", **own, **settings}
    spec = ReplicaSpec(kind, (str(folder), seconds), ModelSettings.model_validate(chosen))
    hear = events.append if events is not None else lambda event: None
    pool = OPEN.enter_context(ReplicaPool.of(spec, timeout, hear))
    deadline = time.monotonic() + 60
    while pool.replicas < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return pool


def begin(pool: ReplicaPool, method: Callable[..., Any], *args: Any) -> Any:
    """Call a method of any stand-in without waiting; Ray's reference to the result."""
    return pool.actor.call.remote(ReplicaCall(method.__name__, args))


def begin_by_reference(pool: ReplicaPool, method: Callable[..., Any], *args: Any) -> Any:
    """The same for a large result: Ray's reference to a list with a reference to the result."""
    return pool.actor.call_by_reference.remote(ReplicaCall(method.__name__, args))
