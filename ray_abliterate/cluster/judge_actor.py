"""Judges in actors of their own: one for each `refusal-judge`, asked by all replicas.

A replica tells the judge each answer as soon as it is whole, and goes on writing the others. The
actor judges what has come meanwhile in batches, and holds the only copy of the classifier. What it
is asked has no side effects, and is kept on disk, so an actor that dies is started anew by Ray, and
asked again.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.connection import live_nodes
from ray_abliterate.cluster.placement import Node, without
from ray_abliterate.cluster.remote_errors import DEATHS, describe_death, original_error
from ray_abliterate.cluster.secrets import Secrets, drivers_secrets
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.judges.build import build_judge
from ray_abliterate.evaluation.judges.judge import Exchange
from ray_abliterate.recipe import RefusalJudge

Result = TypeVar("Result")

AT_ONCE = 64
"""Exchanges that are judged in one go, at most: as many as are lost if that fails."""
LIVES = 3
"""An actor that dies more often is not started again."""
REMEMBERED = 10_000
"""Judgements that a replica has at hand."""


class JudgeActor:
    """A judge in a Ray actor; it begins to load at once, and tells its first caller what fails."""

    def __init__(self, secrets: Secrets, settings: RefusalJudge, threads: int) -> None:
        """
        Args:
            secrets: The driver's.
            settings: What the recipe says of it.
            threads: Of the CPU, for a classifier that computes there.
        """
        secrets.hand_over()
        self._name = settings.name
        self._judge = build_judge(settings, "cuda" if settings.gpus else "cpu")
        self._waiting: list[tuple[Exchange, asyncio.Future[float | None]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._load, threads if settings.classifier else None)

    def __repr__(self) -> str:
        return f"judge {self._name}"

    def _load(self, threads: int | None) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        with contextlib.suppress(Exception):  # raised again when it is asked
            _ = self._judge.identity

    async def identity(self) -> str:
        """See `Judge`."""
        return await self._in_thread(lambda: self._judge.identity)

    async def judge(self, exchange: Exchange) -> float | None:
        """How likely an answer is a refusal, judged with all that wait by then."""
        told: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((exchange, told))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await told

    async def _work(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                asked = [exchange for exchange, _ in some]
                judged = await self._in_thread(partial(self._judge.judge, asked))
            except Exception as error:  # noqa: BLE001  # every caller is told
                for _, told in some:
                    told.set_exception(error)
                continue
            for (_, told), judgement in zip(some, judged, strict=True):
                told.set_result(judgement)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """One thing at a time, and the loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class RemoteJudge:
    """A judge's actor, as scorers know it; see `PrefetchingJudge`."""

    def __init__(self, name: str, handle: Any) -> None:
        """
        Args:
            name: Of the scorer.
            handle: Of a `JudgeActor`.
        """
        self._name, self._handle = name, handle
        self._asked: OrderedDict[Exchange, Any] = OrderedDict()
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteJudge, (self._name, self._handle)

    @property
    def identity(self) -> str:
        """See `Judge`."""
        found: str = self._told(self._handle.identity.remote())
        return found

    def prefetch(self, exchange: Exchange) -> None:
        """See `PrefetchingJudge`."""
        self._ask(exchange)

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """See `Judge`.

        Raises:
            ScoreError: the judge's process dies again and again; or what the judge raises.
        """
        waiting = [self._ask(exchange) for exchange in exchanges]
        try:
            found: list[float | None] = self._told(waiting)
        except Exception:
            self._forget(exchanges)
            raise
        self._forget([e for e, known in zip(exchanges, found, strict=True) if known is None])
        return found

    def _ask(self, exchange: Exchange) -> Any:
        with self._turn:
            known = self._asked.get(exchange)
            if known is None or _has_failed(known):
                self._asked[exchange] = self._handle.judge.remote(exchange)
            self._asked.move_to_end(exchange)
            while len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
            return self._asked[exchange]

    def _forget(self, exchanges: Iterable[Exchange]) -> None:
        with self._turn:
            for exchange in exchanges:
                self._asked.pop(exchange, None)

    def _told(self, waiting: Any) -> Any:
        try:
            return ray.get(waiting)
        except RayTaskError as error:
            raise original_error(error) from None
        except DEATHS as error:
            why = f"the judge {self._name!r} died {LIVES + 1} times ({describe_death(error)})"
            raise ScoreError(
                f"{why}.\n  Choose a smaller classifier, or give it more room (gpus)."
            ) from None


def _has_failed(asked: Any) -> bool:
    """Whether a judgement has failed by now: it may have been a trial's that never asked for it."""
    if not ray.wait([asked], timeout=0)[0]:
        return False
    try:
        ray.get(asked)
    except RayError:
        return True
    return False


@dataclass(frozen=True)
class RunningJudges:
    """The judges of a run, and what they leave of the nodes to replicas."""

    judges: dict[str, RemoteJudge]
    left: Callable[[Sequence[Node]], tuple[Node, ...]] = tuple


@contextlib.contextmanager
def start_judges(settings: Sequence[RefusalJudge]) -> Iterator[RunningJudges]:
    """Judges are started, and gone after the block.

    Raises:
        RecipeError: no node has the GPUs that one asks for.
    """
    handles, taken, judges = [], list[tuple[str, float]](), {}
    try:
        for own in settings:
            node = _node_for(own, without(live_nodes(), taken))
            if own.gpus:
                taken.append((node.id, own.gpus))
            handle = (
                ray.remote(JudgeActor)
                .options(
                    name=f"judge {own.name} {ray.get_runtime_context().get_job_id()}",
                    num_cpus=0,
                    num_gpus=own.gpus,
                    max_concurrency=10_000,
                    max_restarts=LIVES,
                    max_task_retries=LIVES,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=True),
                )
                .remote(
                    drivers_secrets(filter(None, [own.key_variable])),
                    own,
                    own.threads or max(1, int(node.cpus) // 2),
                )
            )
            handles.append(handle)
            judges[own.name] = RemoteJudge(own.name, handle)
        yield RunningJudges(judges, partial(without, taken=tuple(taken)))
    finally:
        for handle in handles:
            ray.kill(handle)


def _node_for(settings: RefusalJudge, there: Sequence[Node]) -> Node:
    """The driver's own node, or the first with GPUs enough."""
    if not settings.gpus:
        here = ray.get_runtime_context().get_node_id()
        return next((node for node in there if node.id == here), there[0])
    fitting = [node for node in there if node.gpus >= settings.gpus]
    if not fitting:
        most = max(node.gpus for node in there)
        raise RecipeError(
            f"scorers.{settings.name}.gpus = {settings.gpus:g}, but no node has more than {most:g} "
            "GPUs to give.\n  Lower it, or set it to 0 to judge on the CPU."
        )
    return fitting[0]
