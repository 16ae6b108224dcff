"""The replica pool as the driver sees it: typed calls of replicas, whichever of them is free.

with ReplicaPool.start(recipe, source, prompts) as pool:
    tuning = pool.call(ReplicaApi.tune, pool.layout.replicas)
"""

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Concatenate

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.actor_call import start_actor_call
from ray_abliterate.cluster.connection import is_own_cluster
from ray_abliterate.cluster.judge_actor import start_judges
from ray_abliterate.cluster.leases import AHEAD
from ray_abliterate.cluster.object_store import ObjectStore, Reference, Stored
from ray_abliterate.cluster.placement import (
    Node,
    ReplicaLayout,
    nodes_for_evaluators,
    nodes_left_by_evaluators,
)
from ray_abliterate.cluster.pool_actor import PoolActor
from ray_abliterate.cluster.remote_errors import ReplicaDied, unwrap
from ray_abliterate.cluster.replica_actor import (
    ReplicaActor,
    ReplicaSpec,
    load_replica,
    load_unedited_replica,
)
from ray_abliterate.cluster.replica_call import Arguments, Parameters, ReplicaCall, Returned
from ray_abliterate.cluster.secrets import drivers_secrets
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import SearchError
from ray_abliterate.recipe import ModelSettings, Recipe, RefusalJudge
from ray_abliterate.replica.messages import ModelFacts, ReplicaApi

NEWS_SECONDS = 1.0
"""How often the driver hears from the pool if nothing happens."""

OnEvent = Callable[[dict[str, Any]], None]
NodeShare = Callable[[Sequence[Node]], tuple[Node, ...]]
"""Returns the part of the nodes that somebody may use."""


class ReplicaPool:
    """The replicas of a run, or of a model that belongs to none.

    Calls name a method of `ReplicaApi` and are checked like calls of it. An argument may be
    `Reference.argument`: a value that was `put` once, in place of a copy with each call.

    Attributes:
        actor: Handle of the pool's process.
        facts: What the first replica reported about the model.
        store: The object store.
        layout: How many replicas there were at the start, and what each takes.
        replicas: Replicas that can be used now, as of a moment ago.
    """

    facts: ModelFacts
    layout: ReplicaLayout

    def __init__(self, actor: Any, on_event: OnEvent) -> None:
        """Prepare to listen to a pool's process; `of` starts one."""
        self.actor = actor
        self.store = ObjectStore()
        self.replicas = 0
        self._left_by_judges: NodeShare = tuple
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
        """Start a run's replicas (see `of`), and the judges that their scorers ask.

        They leave room for the evaluation's own replicas.
        """
        with start_judges(_judges(recipe, prompts)) as running:
            load = partial(load_replica, recipe, source, prompts, running.judges)
            spec = _spec(recipe.model, load, share=partial(_left_for_search, running.left, recipe))
            with cls.of(spec, recipe.search.trial_timeout_seconds, on_event) as pool:
                pool._left_by_judges = running.left
                yield pool

    @classmethod
    def unedited(
        cls, settings: ModelSettings, source: str, on_event: OnEvent = lambda event: None
    ) -> contextlib.AbstractContextManager["ReplicaPool"]:
        """Start replicas of a model that belongs to no run; see `of`.

        They are `UneditedReplica`s, and answer the methods of `UneditedReplicaApi` alone.
        """
        spec = _spec(settings, partial(load_unedited_replica, settings, source))
        return cls.of(spec, on_event=on_event)

    def evaluators(
        self, recipe: Recipe, source: str, on_event: OnEvent, go_on: Callable[[], bool]
    ) -> contextlib.AbstractContextManager["ReplicaPool"]:
        """Start the evaluation's own replicas (see `of`); their pool ends before this one does.

        On a node with replicas of both pools, all map the same pristine weights.
        """
        settings = recipe.evaluation_model
        own = recipe.model_copy(update={"model": settings})
        spec = _spec(
            settings,
            partial(load_replica, own, source, {}),
            section="evaluation",
            share=partial(_offered, self._left_by_judges),
            registry=self.actor,
        )
        return ReplicaPool.of(spec, on_event=on_event, go_on=go_on)

    @classmethod
    @contextmanager
    def of(
        cls,
        spec: ReplicaSpec,
        timeout_seconds: float | None = None,
        on_event: OnEvent = lambda event: None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator["ReplicaPool"]:
        """Start replicas on all nodes, wait for the first, and end them all after the block.

        Args:
            spec: What replicas are made from.
            timeout_seconds: A trial that takes longer fails, and its replica with it.
            on_event: Called with what happens to the fleet, in a thread of its own.
            go_on: Asked now and then whether to wait on for the first replica.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
            SearchError: `go_on` said no before a replica was ready.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = (
            ray.remote(PoolActor)
            .options(
                name=f"{spec.role}-pool {secrets.token_hex(2)}",
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
            )
            .remote(spec, timeout_seconds)
        )
        pool = cls(actor, on_event)
        try:
            pool._listener.start()
            opening = start_actor_call(actor, PoolActor.open)
            while not ray.wait([opening], timeout=NEWS_SECONDS)[0]:
                if not go_on():
                    raise SearchError("no replica was ready before the search ended")
            pool.facts, pool.layout = unwrap(opening)
            yield pool
        finally:
            pool._closed.set()
            ray.kill(actor)
            pool._listener.join(5.0)

    def _listen(self) -> None:
        """Pass on what happens until the block ends."""
        seen, news = 0, self.actor.news.options(max_task_retries=0)
        while not self._closed.is_set():
            try:
                events, seen, self.replicas = ray.get(news.remote(seen, NEWS_SECONDS))
            except (RayError, RuntimeError, ConnectionError):
                self._closed.wait(NEWS_SECONDS)  # gone, or being restarted
                continue
            for event in events:
                self._on_event(event)

    def put(self, value: Stored) -> Reference[Stored]:
        """Store a value that many calls share, and return a reference to it."""
        return self.store.put(value)

    def call(
        self,
        method: Callable[Concatenate[ReplicaApi, Parameters], Returned],
        *args: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Returned:
        """Call a method of any replica, and return its result.

        Raises:
            RayAbliterateError: what the method raises; or two replicas died over the call.
        """
        result: Returned = unwrap(
            start_actor_call(self.actor, PoolActor.call, ReplicaCall.of(method, *args, **options))
        )
        return result

    def map_by_reference(
        self,
        method: Callable[[ReplicaApi, *Arguments], Returned],
        calls: Sequence[tuple[*Arguments]],
    ) -> Iterator[tuple[int, Reference[Returned]]]:
        """Call a method once per argument tuple; the results stay on the nodes that made them.

        Yields:
            Number of the call, and a reference to its result, as they come.
        """
        waiting = {
            start_actor_call(
                self.actor, PoolActor.call_by_reference, ReplicaCall(method.__name__, args)
            ): number
            for number, args in enumerate(calls)
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready[0]), Reference(unwrap(ready[0])[0])

    def map(
        self,
        method: Callable[[ReplicaApi, *Arguments], Returned],
        calls: Iterable[tuple[*Arguments]],
        most_out: int | None = None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[Returned]:
        """Call a method once per argument tuple, and yield the results as they come.

        Args:
            method: Such as `ReplicaApi.measure`.
            calls: Arguments; read only as calls are made.
            most_out: Calls that are out at once; all of them if None.
            go_on: Asked now and then; once it says no, nothing more is called or waited for.
        """
        unmade, waiting = iter(calls), list[Any]()
        while go_on():
            made = islice(unmade, None if most_out is None else most_out - len(waiting))
            waiting += [
                start_actor_call(self.actor, PoolActor.call, ReplicaCall(method.__name__, args))
                for args in made
            ]
            if not waiting:
                return
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=NEWS_SECONDS)
            for reference in ready:
                yield unwrap(reference)

    def streams(
        self,
        method: Callable[[ReplicaApi, *Arguments], Iterator[Returned]],
        count: int,
        arguments: Callable[[int], tuple[*Arguments]],
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, Returned]]:
        """Call a method that yields `count` times, as many at once as there are replicas.

        A replica is at most a few items ahead of the consumer. A call whose replica dies is made
        again, with arguments that say what has come of it; once, if they have not changed.

        Args:
            method: A generator, such as `ReplicaApi.read`.
            count: Number of calls.
            arguments: Returns the arguments of a call by its number; asked when the call is made.
            go_on: Asked now and then; once it says no, nothing more is called or waited for.

        Yields:
            Number of the call, and an item.
        """
        unmade, running = deque(range(count)), list[tuple[Any, int]]()
        tried: dict[int, tuple[*Arguments]] = {}
        second_tries: set[int] = set()
        while go_on() and (unmade or running):
            while unmade and len(running) < max(self.replicas, 1):
                number = unmade.popleft()
                args = arguments(number)
                unchanged = tried.get(number) == args
                (second_tries.add if unchanged else second_tries.discard)(number)
                tried[number] = args
                items = self._stream.remote(ReplicaCall(method.__name__, args))
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
                    if number in second_tries:
                        raise
                    unmade.appendleft(number)
                running = [(known, n) for known, n in running if known is not items]

    @property
    def _stream(self) -> Any:
        return self.actor.stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=AHEAD, max_task_retries=0
        )


def _spec(settings: ModelSettings, load: Callable[..., Any], **options: Any) -> ReplicaSpec:
    """Describe real replicas: `load` makes one, `options` are further fields of `ReplicaSpec`."""
    args = (settings.name, drivers_secrets(), load)
    return ReplicaSpec(ReplicaActor, args, settings, patient=not is_own_cluster(), **options)


def _judges(recipe: Recipe, prompts: Mapping[str, PromptSet]) -> list[RefusalJudge]:
    """Return the judges that will be asked: by scorers with prompts, or by the prompt filter."""
    names = set(prompts)
    if recipe.prompts.filter_by_behaviour and recipe.behaviour_test is not None:
        names.add(recipe.behaviour_test.name)
    return [s for s in recipe.scorers if isinstance(s, RefusalJudge) and s.name in names]


def _left_for_search(left: NodeShare, recipe: Recipe, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return what judges, and the evaluation's own replicas, leave of the nodes."""
    rest = left(nodes)
    return (
        nodes_left_by_evaluators(recipe.evaluation_model, rest)
        if recipe.evaluation.replicas
        else rest
    )


def _offered(left: NodeShare, nodes: Sequence[Node]) -> tuple[Node, ...]:
    return nodes_for_evaluators(left(nodes))
