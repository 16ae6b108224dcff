"""Stand-ins for the processes that replicas live in: they take a fixed time, or misbehave.

The rest of a search over them is real: pool, fleet, Tune, sampler, journal. Tests use them, too.
"""

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.placement import Placement
from ray_abliterate.cluster.replica_actor import ReplicaProcess
from ray_abliterate.replica.messages import Evaluation, ModelFacts
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard

EXCESSIVE_BYTES = 4_000_000_000
"""Memory that a replica takes when it is to be killed for it."""


def made_up_evaluation(plan: Plan, seconds: float, **detail: Any) -> Evaluation:
    """Return made-up scores that differ from plan to plan and trade off against each other.

    Args:
        plan: Half its first component's peak becomes the rate, the rest to 1 the KL divergence.
        seconds: Time that the evaluation is said to have taken.
        **detail: Details of the rate.
    """
    x = plan.profiles[0][1].peak / 2
    scores = (Score("rate", x, x, x, detail=detail), Score("kl", 1 - x, 1 - x, 1 - x))
    return Evaluation(Scorecard(scores), seconds)


def made_up_facts() -> ModelFacts:
    """Return the facts of a model without weights."""
    shape = ModelShape(8, 32, ("attn", "mlp"))
    return ModelFacts(shape, 0, 0, 0, 0, "float32", "cpu", "stand-in", None)


class TimedReplica(ReplicaProcess):
    """Holds its place for a fixed time per trial and says when it began and ended."""

    def __init__(self, placement: Placement, seconds: float) -> None:
        self._seconds = seconds

    def describe(self) -> ModelFacts:
        """Return made-up facts."""
        return made_up_facts()

    def evaluate(self, plan: Plan, *_: Any) -> Evaluation:
        """Wait, and return made-up scores."""
        began = time.time()
        time.sleep(self._seconds)
        return made_up_evaluation(plan, self._seconds, began=began, ended=time.time())


class TimedReader(ReplicaProcess):
    """Reads a made-up text, or measures a suite, in a fixed time per chunk."""

    def __init__(self, placement: Placement, seconds: float, chunks: int) -> None:
        self._seconds, self._chunks = seconds, chunks

    def describe(self) -> ModelFacts:
        """Return made-up facts."""
        return made_up_facts()

    def plan_reading(self, request: Any, count: bool) -> Any:
        """Return a plan that divides the text into independent chunks where the request allows."""
        from ray_abliterate.evaluation.streaming.reader import ReadPlan

        stretch = None if request.carry == "kv" else 4
        return ReadPlan(request, "made up", self._chunks * 100, self._chunks, stretch, ())

    def read(self, reading: Any, first: int, count: int | None, *_: Any) -> Iterator[Any]:
        """Wait for each chunk and yield a made-up result."""
        from ray_abliterate.evaluation.streaming import ChunkResult

        for index in range(first, self._chunks if count is None else first + count):
            time.sleep(self._seconds)
            yield ChunkResult(index, 100 * index, 100 * index + 100, 100, 1.0, 0.0, 1, 0)

    def measure(self, suite: Any, chunk: Any, *_: Any) -> str:
        """Wait, and return the chunk's id."""
        time.sleep(self._seconds)
        return str(chunk.id)


class FaultyReplica(ReplicaProcess):
    """Evaluates in a fixed time, and misbehaves once for each file that lies in its folder.

    `hang`, `no-memory`, `no-device-memory` and `excessive-memory` are the files' names; they are
    deleted when they take effect. A folder `broken/NODE` makes every call fail on that node. Each
    evaluation that begins is a line of `evaluations.jsonl`.
    """

    def __init__(self, placement: Placement, folder: str, seconds: float) -> None:
        self._placement, self._folder, self._seconds = placement, Path(folder), seconds

    @property
    def replica(self) -> Any:
        """The object whose methods are called.

        Raises:
            RuntimeError: It was told to be broken.
        """
        if (self._folder / "broken" / self._placement.node).exists():
            raise RuntimeError("CUDA driver initialization failed (as told to)")
        return self

    def describe(self) -> ModelFacts:
        """Return made-up facts."""
        return made_up_facts()

    def make_array(self, value: float, size: int) -> Any:
        """Return an array of `size` bytes, every element of which is `value`."""
        import numpy

        return numpy.full(size // 8, value, numpy.float64)

    def evaluate(self, plan: Plan, *_: Any) -> Evaluation:
        """Wait, misbehave if told to, and return made-up scores."""
        process = {"pid": os.getpid(), "node": self._placement.node}
        entry = {**process, "plan": plan.to_json(), "began": time.monotonic()}
        with (self._folder / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        time.sleep(3600 if self._once("hang") else self._seconds)
        if self._once("no-memory"):
            raise_memory_error()
        if self._once("no-device-memory"):
            import torch

            torch.empty(2**50, dtype=torch.int8, device="cuda")
        if self._once("excessive-memory"):
            import numpy

            block = numpy.ones(EXCESSIVE_BYTES, numpy.int8)
            time.sleep(60)
            del block
        return made_up_evaluation(plan, self._seconds)

    def _once(self, name: str) -> bool:
        """Return whether a file lies in the folder, and delete it."""
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True


def raise_memory_error() -> None:
    """Ask for more memory than this process may have.

    Raises:
        MemoryError: Always; the system refuses.
    """
    import psutil

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + EXCESSIVE_BYTES // 4, before[1]))
    try:
        bytearray(EXCESSIVE_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
