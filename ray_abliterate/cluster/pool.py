"""The replica pool: leases replicas to calls, and survives their deaths.

The pool owns every lease, so a caller that dies can't leak one. A replica that dies leaves the
rotation, its work goes to another replica at once, and it comes back when it answers. Work fails
only when it has failed with two replicas, or none comes back in time.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ray_abliterate.cluster.errors import DEATHS, unwrap
from ray_abliterate.cluster.store import ObjectStore
from ray_abliterate.dominance import Bar
from ray_abliterate.errors import ModelError, RayAbliterateError, SearchError
from ray_abliterate.evaluation import Evaluation, ModelFacts
from ray_abliterate.prompts import PromptSet
from ray_abliterate.recipe import ModelSettings, Recipe

log = logging.getLogger(__name__)

NO_REPLICA_SECONDS = 900.0
"""A call waits this long for any replica; a restarted one has to load its model."""
SLOTS_SECONDS = 60.0
"""Trial slots wait this long for each other at the start."""
GATHER_SECONDS = 0.5
"""Plans that may share a pass wait this long for others: about what the sampler needs for a few."""


@dataclass(frozen=True)
class Layout:
    """How many replicas, and what each takes."""

    replicas: int
    gpus: float
    cpus: float
    threads: int


def connect(dashboard: bool = True, python_path: Sequence[str] = ()) -> str:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray on this machine.

    Returns:
        The dashboard's address, or nothing.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        paths = [*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
        local = not os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = (
            {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"} if local else {}
        )
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment} if environment else None,
            **options,
        )
    return str(getattr(ray._private.worker._global_node, "webui_url", "") or "")


def plan_layout(settings: ModelSettings, cpus: float, gpus: float) -> Layout:
    """Replicas for the machine or cluster at hand.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    per_replica = settings.gpus_per_replica
    if per_replica is None:
        per_replica = 1.0 if gpus >= 1 else 0.0
    if per_replica > gpus:
        raise ModelError(
            f"model.gpus_per_replica = {per_replica:g}, but there are {gpus:g} GPUs.\n"
            "  Lower it, or set it to 0 to run on the CPU."
        )
    fitting = int(gpus / per_replica + 1e-6) if per_replica else 1
    replicas = settings.replicas or max(1, fitting)
    if per_replica and replicas > fitting:
        raise ModelError(
            f"model.replicas = {replicas} of {per_replica:g} GPUs each need "
            f"{replicas * per_replica:g} GPUs, but there are {gpus:g}; {fitting} fit."
        )
    threads = settings.threads_per_replica or max(1, int(cpus) // replicas)
    share = 1.0 if per_replica else float(threads)
    return Layout(replicas, per_replica, min(share, max(cpus / replicas, 0.1)), threads)


class ReplicaHost:
    """A replica in a Ray actor. A constructor that fails is told to the first caller."""

    def __init__(
        self,
        index: int,
        recipe: Recipe,
        source: str,
        prompts: Mapping[str, PromptSet],
        threads: int,
    ) -> None:
        self._label = f"replica-{index} {recipe.model.name}"
        self._replica: Any = None
        self._failure: BaseException | None = None
        from ray_abliterate.replica import Replica  # torch, in this process only

        try:
            self._replica = Replica(recipe, source, prompts, threads)
        except (RayAbliterateError, RuntimeError, OSError, ValueError, MemoryError) as error:
            self._failure = error

    def __repr__(self) -> str:
        return self._label

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the replica."""
        if self._replica is None:
            assert self._failure is not None
            raise self._failure
        return getattr(self._replica, method)(*args)

    def call_by_reference(self, method: str, *args: Any) -> tuple[None, Any]:
        """The same as two objects, so that one can wait for the call without its result."""
        return None, self.call(method, *args)


@dataclass(frozen=True)
class _Waiting:
    """A plan that waits for a replica."""

    plan: Any
    setup: list[Any]
    result: "asyncio.Future[Evaluation]"


class PoolActor:
    """Hands calls to free replicas, in the order they come."""

    def __init__(
        self, replicas: list[Any], timeout_seconds: float | None, trials_per_pass: int = 1
    ) -> None:
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        self._timeout = timeout_seconds
        self._per_pass = trials_per_pass
        self._waiting: list[_Waiting] = []
        self._in_service = 0
        self._slots = 1
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: dict[str, Any] = {}
        self._bar: Bar | None = None
        self._missing_slots = 0
        self._slots_there = asyncio.Event()
        for replica in replicas:
            self._free.put_nowait(replica)

    def __repr__(self) -> str:
        return "replica-pool"

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
        return await own.result

    async def _hand_out(self) -> None:
        """Give one replica as many of the waiting plans as share a pass."""
        try:
            replica = await self._lease()
        except SearchError as error:
            left, self._waiting = self._waiting, []
            for own in left:
                own.result.set_exception(error)
            return
        await self._gather()
        group = self._waiting[: self._per_pass]
        self._waiting = self._waiting[self._per_pass :]
        self._in_service += len(group)
        if self._waiting:
            self._start(self._hand_out())
        plans, setup = [waiting.plan for waiting in group], group[0].setup[0]
        timeout = self._timeout * len(group) if self._timeout is not None else None
        try:
            if len(group) == 1:
                args = [plans[0], setup, self._bar]
                found = [await self._run(replica, "evaluate", args, timeout)]
            else:
                args = [plans, setup, self._bar]
                found = await self._run(replica, "evaluate_together", args, timeout)
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

    async def call(self, method: str, args: list[Any]) -> Any:
        """Run a method on a free replica; on its death, on another one.

        Args:
            method: Name of a method of `Replica`.
            args: Its arguments, object references among them.
        """
        return await self._run(await self._lease(), method, args)

    async def call_by_reference(self, method: str, args: list[Any]) -> list[Any]:
        """Run a method as `call` does, and leave its result on the node that made it.

        Returns:
            One reference, in a list so that it is not resolved here.
        """
        return [await self._run(await self._lease(), method, args, send=_send_by_reference)]

    async def _run(
        self,
        replica: Any,
        method: str,
        args: list[Any],
        timeout: float | None = None,
        send: Callable[..., Awaitable[Any]] | None = None,
    ) -> Any:
        """Run a method on a leased replica, and give it back."""
        deaths = 0
        while True:
            try:
                work = (send or _send)(replica, method, args)
                result = await asyncio.wait_for(work, timeout)
            except TimeoutError:
                ray.kill(replica, no_restart=False)
                self._revive(replica)
                raise SearchError(
                    f"no answer within search.trial_timeout_seconds = {self._timeout:g}; "
                    "the replica was started anew"
                ) from None
            except DEATHS as error:
                self._revive(replica)
                deaths += 1
                if deaths == 2:
                    raise SearchError(
                        f"two replicas died over this call ({type(error).__name__}); out of memory?"
                    ) from None
                replica = await self._lease()
                continue
            except BaseException:
                self._free.put_nowait(replica)
                raise
            self._free.put_nowait(replica)
            return result

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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

    async def _lease(self) -> Any:
        try:
            return await asyncio.wait_for(self._free.get(), NO_REPLICA_SECONDS)
        except TimeoutError:
            raise SearchError(f"no replica was free for {NO_REPLICA_SECONDS:g} seconds") from None

    def _revive(self, replica: Any) -> None:
        """Back into rotation once it answers (Ray restarts it from its constructor)."""

        async def wait() -> None:
            delay = 0.5
            while True:
                try:
                    await _ready(replica.call.remote("describe"))
                except DEATHS:
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 30.0)
                    continue
                except RayTaskError as error:
                    log.error("a replica could not be started again: %s", error)
                    return
                self._free.put_nowait(replica)
                return

        self._start(wait())


async def _ready(reference: Any) -> Any:
    return await reference


async def _send(replica: Any, method: str, args: list[Any]) -> Any:
    return await replica.call.remote(method, *args)


async def _send_by_reference(replica: Any, method: str, args: list[Any]) -> Any:
    call = replica.call_by_reference.options(num_returns=2)
    done, result = call.remote(method, *args)
    await done
    return result


class ReplicaPool:
    """The driver's side of the pool."""

    def __init__(self, actor: Any, hosts: list[Any], facts: ModelFacts, layout: Layout) -> None:
        self.actor = actor
        self.facts = facts
        self.layout = layout
        self.store = ObjectStore()
        self._hosts = hosts

    @classmethod
    @contextmanager
    def start(
        cls, recipe: Recipe, source: str, prompts: Mapping[str, PromptSet]
    ) -> Iterator["ReplicaPool"]:
        """Start replicas and wait for the first; all are gone after the block.

        Raises:
            ModelError: the model cannot be loaded, or the GPUs don't suffice.
        """
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        layout = plan_layout(recipe.model, cpus, gpus)
        host = ray.remote(ReplicaHost)
        hosts = [
            host.options(
                num_gpus=layout.gpus, num_cpus=layout.cpus, max_restarts=-1, max_task_retries=0
            ).remote(index, recipe, source, prompts, layout.threads)
            for index in range(layout.replicas)
        ]
        actor = None
        try:
            facts = _first_facts(hosts)
            pool = ray.remote(PoolActor).options(num_cpus=0, max_concurrency=10_000)
            search = recipe.search
            actor = pool.remote(hosts, search.trial_timeout_seconds, search.trials_per_pass)
            yield cls(actor, hosts, facts, layout)
        finally:
            for handle in [*hosts, *([actor] if actor is not None else [])]:
                ray.kill(handle)

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

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Call a method once per argument tuple; results as they come."""
        waiting = [self.actor.call.remote(method, list(args)) for args in calls]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            yield unwrap(ready[0])

    def map_by_reference(
        self, method: str, calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Call a method once per argument tuple; as they come, place and reference of the result.

        The result stays where it was made, and outlives the replica that made it.
        """
        waiting = {
            self.actor.call_by_reference.remote(method, list(args)): place
            for place, args in enumerate(calls)
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready[0]), unwrap(ready[0])[0]


def _first_facts(hosts: list[Any]) -> ModelFacts:
    """What the first replica that loads says; a loading error is raised as it is."""
    waiting = [host.call.remote("describe") for host in hosts]
    ready, _ = ray.wait(waiting, num_returns=1)
    facts: ModelFacts = unwrap(ready[0])
    return facts
