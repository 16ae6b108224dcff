"""The driver's side of the replica pool."""

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.connection import ours
from ray_abliterate.cluster.judge_actor import judging
from ray_abliterate.cluster.object_store import ObjectStore
from ray_abliterate.cluster.placement import Layout, Node, left_by, offered
from ray_abliterate.cluster.pool_actor import AHEAD, PoolActor
from ray_abliterate.cluster.remote_errors import ReplicaDied, unwrap
from ray_abliterate.cluster.replica_actor import Hosting, ReplicaHost
from ray_abliterate.cluster.secrets import drivers_secrets
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import SearchError
from ray_abliterate.recipe import ModelSettings, Recipe, RefusalJudge
from ray_abliterate.replica.messages import Evaluation

NEWS_SECONDS = 1.0
"""How often the driver hears from the pool if nothing happens."""

OnEvent = Callable[[dict[str, Any]], None]
Share = Callable[[Sequence[Node]], tuple[Node, ...]]
"""What there is of nodes for somebody."""


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
        self._left: Share = tuple
        self._on_event = on_event
        self._closed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="pool-news", daemon=True)

    @classmethod
    @contextmanager
    def start(
        cls,
        recipe: Recipe,
        source: str,
        prompts: Mapping[str, PromptSet],
        on_event: OnEvent = lambda event: None,
    ) -> Iterator["ReplicaPool"]:
        """A pool of real replicas, see `of`, and the judges that their scorers ask.

        The evaluation's own replicas find room beside them.
        """
        with judging(_judges(recipe, prompts)) as bench:
            args = (recipe, source, prompts, bench.judges)
            hosting = Hosting(
                ReplicaHost,
                _args(recipe.model, "ray_abliterate.replica.replica:Replica", args),
                recipe.model,
                patient=not ours(),
                share=partial(_beside, bench.left, recipe),
            )
            with cls.of(hosting, recipe.search.trial_timeout_seconds, on_event) as pool:
                pool._left = bench.left
                yield pool

    @classmethod
    def bare(
        cls, settings: ModelSettings, source: str, on_event: OnEvent = lambda event: None
    ) -> contextlib.AbstractContextManager["ReplicaPool"]:
        """A pool of a model of no run, see `of`; its replicas are `BareReplica`s."""
        args = _args(
            settings, "ray_abliterate.replica.unedited_replica:BareReplica", (settings, source)
        )
        return cls.of(Hosting(ReplicaHost, args, settings, not ours()), on_event=on_event)

    def evaluators(
        self, recipe: Recipe, source: str, on_event: OnEvent, go_on: Callable[[], bool]
    ) -> contextlib.AbstractContextManager["ReplicaPool"]:
        """The evaluation's own pool beside this one, see `of`; it ends before this one does.

        On a node with replicas of both, all map the same pristine weights.
        """
        settings = recipe.evaluators
        own = recipe.model_copy(update={"model": settings})
        args = _args(settings, "ray_abliterate.replica.replica:Replica", (own, source, {}))
        share = partial(_offered, self._left)
        hosting = Hosting(ReplicaHost, args, settings, not ours(), "evaluation", share, self.actor)
        return ReplicaPool.of(hosting, on_event=on_event, go_on=go_on)

    @classmethod
    @contextmanager
    def of(
        cls,
        hosting: Hosting,
        timeout_seconds: float | None = None,
        on_event: OnEvent = lambda event: None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator["ReplicaPool"]:
        """Start replicas on all nodes and wait for the first; all are gone after the block.

        Args:
            hosting: What replicas are made from.
            timeout_seconds: A trial that takes longer fails, and its replica with it.
            on_event: Told what happens to the fleet, in a thread of its own.
            go_on: Asked now and then whether a replica is still waited for.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
            SearchError: no replica is waited for any more.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = (
            ray.remote(PoolActor)
            .options(
                name=f"{hosting.role}-pool {secrets.token_hex(2)}",
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
            )
            .remote(hosting, timeout_seconds)
        )
        pool = cls(actor, on_event)
        try:
            pool._listener.start()
            opening = actor.open.remote()
            while not ray.wait([opening], timeout=NEWS_SECONDS)[0]:
                if not go_on():
                    raise SearchError("no replica was there by the end")
            pool.facts, pool.layout = unwrap(opening)
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
        self,
        method: str,
        calls: Iterable[tuple[Any, ...]],
        most_out: int | None = None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[Any]:
        """Call a method once per argument tuple; results as they come.

        Args:
            method: Of the replicas.
            calls: Arguments; read only as calls are made.
            most_out: Calls that are out at once; all of them if unset.
            go_on: Asked now and then; once it says no, nothing more is called or waited for.
        """
        left, waiting = iter(calls), list[Any]()
        while go_on():
            more = islice(left, None if most_out is None else most_out - len(waiting))
            waiting += [self.actor.call.remote(method, list(args)) for args in more]
            if not waiting:
                return
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=NEWS_SECONDS)
            for reference in ready:
                yield unwrap(reference)

    def streams(
        self,
        method: str,
        count: int,
        arguments: Callable[[int], tuple[Any, ...]],
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, Any]]:
        """Call a method that yields so many times, as many at once as there are replicas.

        A replica is at most a few items ahead of who takes them here. A call whose replica dies is
        made again, with arguments that say what has come of it; once, if they have not changed.

        Args:
            method: Of the replicas; a generator.
            count: Number of calls.
            arguments: Of call number so and so, asked for when it is made.
            go_on: Asked now and then; once it says no, nothing more is called or waited for.

        Yields:
            Number of the call, and an item.
        """
        left, running = deque(range(count)), list[tuple[Any, int]]()
        tried: dict[int, tuple[Any, ...]] = {}
        again: set[int] = set()
        while go_on() and (left or running):
            while left and len(running) < max(self.replicas, 1):
                number = left.popleft()
                args = arguments(number)
                (again.add if tried.get(number) == args else again.discard)(number)
                tried[number] = args
                items = self._stream.remote(method, list(args))
                running.append((items, number))
            ready, _ = ray.wait(
                [items for items, _ in running], timeout=NEWS_SECONDS, fetch_local=False
            )
            for items in ready:
                number = next(n for known, n in running if known is items)
                try:
                    yield number, unwrap(next(items))
                    continue
                except StopIteration:
                    pass
                except ReplicaDied:
                    if number in again:
                        raise
                    left.appendleft(number)
                running = [(known, n) for known, n in running if known is not items]

    @property
    def _stream(self) -> Any:
        return self.actor.stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=AHEAD, max_task_retries=0
        )


def _args(settings: ModelSettings, kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a `ReplicaHost`, after its place."""
    return settings.name, drivers_secrets(), kind, args


def _judges(recipe: Recipe, prompts: Mapping[str, PromptSet]) -> list[RefusalJudge]:
    """Those that will be asked: about prompts that are there, or about the prompt sets."""
    names = set(prompts)
    if recipe.prompts.filter_by_behaviour and recipe.behaviour_test is not None:
        names.add(recipe.behaviour_test.name)
    return [s for s in recipe.scorers if isinstance(s, RefusalJudge) and s.name in names]


def _beside(left: Share, recipe: Recipe, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """What judges, and the evaluation's own replicas, leave of the nodes."""
    there = left(nodes)
    return left_by(recipe.evaluators, there) if recipe.evaluation.replicas else there


def _offered(left: Share, nodes: Sequence[Node]) -> tuple[Node, ...]:
    return offered(left(nodes))
