"""Judges in actors of their own: one for each `refusal-judge`, asked by all replicas.

A replica sends the judge each answer as soon as it is complete, and goes on generating the others.
The actor judges in batches what has come meanwhile, and holds the only copy of the classifier.
Judging has no side effects, and judgements are stored on disk, so an actor that dies is restarted
by Ray and asked again.
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
from ray_abliterate.cluster.placement import Node, without_gpus
from ray_abliterate.cluster.remote_errors import DEATHS, describe_death, original_error
from ray_abliterate.cluster.secrets import Secrets, drivers_secrets
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.judges.build import build_judge
from ray_abliterate.evaluation.judges.judge import Exchange
from ray_abliterate.recipe import RefusalJudge

Judged = TypeVar("Judged")

AT_ONCE = 64
"""Exchanges of one batch, at most: as many as are lost if it fails."""
LIVES = 3
"""An actor that dies more often is not restarted."""
REMEMBERED = 10_000
"""Judgements that a replica remembers."""


class JudgeActor:
    """A judge in a Ray actor; what its loading raises is raised to the first caller."""

    def __init__(self, secrets: Secrets, settings: RefusalJudge, threads: int) -> None:
        """Begin to load the judge in the background.

        Args:
            secrets: The driver's.
            settings: The recipe's.
            threads: CPU threads, for a classifier that computes there.
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
        """Return what tells this judge from others; see `Judge`."""
        return await self._in_thread(lambda: self._judge.identity)

    async def judge(self, exchange: Exchange) -> float | None:
        """Return how likely an answer is a refusal; it is judged with all that wait by then."""
        judgement: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((exchange, judgement))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._judge_batches())
        return await judgement

    async def _judge_batches(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                exchanges = [exchange for exchange, _ in batch]
                judgements = await self._in_thread(partial(self._judge.judge, exchanges))
            except Exception as error:  # noqa: BLE001  # raised to every caller
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), judgement in zip(batch, judgements, strict=True):
                future.set_result(judgement)

    async def _in_thread(self, work: Callable[[], Judged]) -> Judged:
        """Do one thing at a time, while the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class RemoteJudge:
    """A judge's actor, as scorers know it: a `PrefetchingJudge`."""

    def __init__(self, name: str, handle: Any) -> None:
        """Ask nothing yet.

        Args:
            name: The scorer's.
            handle: Ray's handle of a `JudgeActor`.
        """
        self._name, self._handle = name, handle
        self._asked: OrderedDict[Exchange, Any] = OrderedDict()
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteJudge, (self._name, self._handle)

    @property
    def identity(self) -> str:
        """What tells this judge from others; see `Judge`."""
        identity: str = self._fetch(self._handle.identity.remote())
        return identity

    def prefetch(self, exchange: Exchange) -> None:
        """Have an exchange judged, without waiting; see `PrefetchingJudge`."""
        self._ask(exchange)

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return how likely each answer is a refusal; see `Judge`.

        Raises:
            ScoreError: the judge's process dies again and again; or what the judge raises.
        """
        waiting = [self._ask(exchange) for exchange in exchanges]
        try:
            judgements: list[float | None] = self._fetch(waiting)
        except Exception:
            self._forget(exchanges)
            raise
        undecided = [e for e, own in zip(exchanges, judgements, strict=True) if own is None]
        self._forget(undecided)
        return judgements

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

    def _fetch(self, waiting: Any) -> Any:
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
    """Return whether a judgement has failed; it may be one that a pruned trial never fetched."""
    if not ray.wait([asked], timeout=0)[0]:
        return False
    try:
        ray.get(asked)
    except RayError:
        return True
    return False


@dataclass(frozen=True)
class RunningJudges:
    """The judges of a run.

    Attributes:
        judges: By the name of the scorer.
        left: Returns what the judges leave of the nodes to replicas.
    """

    judges: dict[str, RemoteJudge]
    left: Callable[[Sequence[Node]], tuple[Node, ...]] = tuple


@contextlib.contextmanager
def start_judges(settings: Sequence[RefusalJudge]) -> Iterator[RunningJudges]:
    """Start the judges, and end them after the block.

    Raises:
        RecipeError: no node has the GPUs that one asks for.
    """
    handles, taken, judges = [], list[tuple[str, float]](), {}
    try:
        for own in settings:
            node = _node_for(own, without_gpus(live_nodes(), taken))
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
        yield RunningJudges(judges, partial(without_gpus, taken=tuple(taken)))
    finally:
        for handle in handles:
            ray.kill(handle)


def _node_for(settings: RefusalJudge, nodes: Sequence[Node]) -> Node:
    """Return the driver's own node, or the first one with enough GPUs."""
    if not settings.gpus:
        here = ray.get_runtime_context().get_node_id()
        return next((node for node in nodes if node.id == here), nodes[0])
    fitting = [node for node in nodes if node.gpus >= settings.gpus]
    if not fitting:
        most = max(node.gpus for node in nodes)
        raise RecipeError(
            f"scorers.{settings.name}.gpus = {settings.gpus:g}, but no node has more than {most:g} "
            "GPUs free.\n  Lower it, or set it to 0 to judge on the CPU."
        )
    return fitting[0]
