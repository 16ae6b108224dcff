"""Stand-ins for the process a replica lives in: they score plans at once, or misbehave."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from ray_abliterate.cluster.node_store import NodeStore
from ray_abliterate.cluster.placement import Place
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.replica_actor import Callee, Hosting
from ray_abliterate.errors import ScoreError
from ray_abliterate.recipe import ModelSettings, SpaceSettings
from ray_abliterate.replica.messages import Evaluation
from ray_abliterate.search.dominance import score_all
from ray_abliterate.search.plan import ModelShape, Space
from ray_abliterate.search.score import Score, Scorecard

GOALS = [("rate", "minimize"), ("kl", "minimize")]
SHAPE = ModelShape(8, 32, ("attn", "mlp"))
SPACE = Space.of(SHAPE, SpaceSettings(), "none")


class Host(Callee):
    """Scores a plan by its peak; `folder` counts calls and holds switches."""

    def __init__(self, place: Place, folder: str, seconds: float = 0.0) -> None:
        self.place = place
        self.folder, self.seconds = Path(folder), seconds

    def _once(self, name: str) -> bool:
        """Whether a switch is set; taking it resets it (one process only)."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def call(self, method: str, *args: Any) -> Any:
        if method == "describe":
            return f"facts of {self.place.index}"
        if method == "echo":
            return args
        if method == "large":
            return bytes(1_000_000)
        if method == "die":
            os._exit(1)
        if method == "raise":
            raise ScoreError("the score is broken")
        if method == "sleep":
            time.sleep(args[0])
            return "slept"
        time.sleep(self.seconds)
        if self._once("die-once"):
            os._exit(1)
        with (self.folder / "passes").open("a") as file:
            file.write("pass\n")
        if method == "evaluate_together":
            return [self._evaluation(plan) for plan in args[0]]
        evaluation = self._evaluation(args[0])
        if isinstance(evaluation, Exception):
            raise evaluation
        return evaluation

    def call_by_reference(self, method: str, *args: Any) -> tuple[None, Any]:
        return None, self.call(method, *args)

    def _evaluation(self, plan: Any) -> Evaluation | Exception:
        try:
            return self._score(plan)
        except ScoreError as error:
            return error

    def _score(self, plan: Any) -> Evaluation:
        if self._once("nan-once"):
            Score("rate", math.nan, 0, 0)
        peak = plan.profiles[0][1].peak
        scores = (Score("rate", 2 - peak, 0, 2), Score("kl", peak, 0, 2))
        return Evaluation(Scorecard(scores), self.seconds)


class CountingHost(Host):
    """Yields numbers."""

    def call(self, method: str, *args: Any) -> Any:
        return self._count(*args) if method == "count" else super().call(method, *args)

    def _count(self, first: int, stop: int, dies_at: int) -> Iterator[int]:
        """Numbers; where it comes to one number it dies, unless it began there."""
        for number in range(first, stop):
            if number == dies_at and (number != first or not number):
                time.sleep(0.5)  # what was yielded is on its way
                os._exit(1)
            yield number


class JitteryHost(Host):
    """Takes its time, never the same; the first of each folder longest."""

    def call(self, method: str, *args: Any) -> Any:
        if method == "evaluate":
            time.sleep(random.uniform(0, 0.3))
        return super().call(method, *args)


class SharingHost(Host):
    """Shares an array with the replicas of its node."""

    def call(self, method: str, *args: Any) -> Any:
        if method == "share":
            mine = numpy.full(100_000, self.place.index + 1)
            if not hasattr(self, "array"):
                self.array = NodeStore(self.place).share(args[0], lambda: {"array": mine})["array"]
            array = self.array
            assert (array == array[0]).all()
            return self.place.index, os.getpid(), int(array[0]), bool(array.flags.writeable)
        return super().call(method, *args)


class Moved:
    """A divergence that the first component's peak decides."""

    name, goal, best = "kl", "minimize", 0.0

    def score(self, plan: Any) -> Score:
        peak = plan.profiles[0][1].peak
        return Score("kl", peak, 0, 2)


class Declined:
    """A rate that both peaks decide, counted hit by hit; `read` sums up what was counted."""

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


class StoppableHost(Host):
    """Scores a plan as replicas do: against the bar. Keeps the bars that it was given."""

    def call(self, method: str, *args: Any) -> Any:
        if method != "evaluate":
            return super().call(method, *args)
        plan, _setup, bar = args
        with (self.folder / "bars.jsonl").open("a") as file:
            file.write(json.dumps(bar.marks if bar is not None else None) + "\n")
        return Evaluation(score_all((Declined(), Moved()), plan, bar), 0.0)  # type: ignore[arg-type]


OPEN = ExitStack()
"""Pools of the test that runs."""


def pool_of(
    folder: Path,
    count: int,
    seconds: float = 0.0,
    timeout: float | None = None,
    kind: type[Host] = Host,
    events: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> ReplicaPool:
    """A real pool over stand-ins, until the end of the test; all are up."""
    own = {"replicas": count, "gpus_per_replica": 0, "threads_per_replica": 1}
    chosen = {"name": "stand-in", **own, **settings}
    hosting = Hosting(kind, (str(folder), seconds), ModelSettings.model_validate(chosen))
    hear = events.append if events is not None else lambda event: None
    pool = OPEN.enter_context(ReplicaPool.of(hosting, timeout, hear))
    deadline = time.monotonic() + 60
    while pool.replicas < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return pool
