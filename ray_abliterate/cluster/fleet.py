"""The fleet: replicas are started where there is room, replaced when they die, given up at last.

Lives in the pool's process. A replica is one Ray actor for one life; the next life at the same
place is another actor, so that nothing depends on how Ray restarts and retries.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ray_abliterate.cluster.connection import live_nodes
from ray_abliterate.cluster.events import ReportEvent
from ray_abliterate.cluster.placement import (
    Node,
    Placement,
    ReplicaLayout,
    count_unplaced,
    gpus_per_replica,
    layout_of,
    place_replicas,
    refuse_what_does_not_fit,
)
from ray_abliterate.cluster.remote_errors import (
    DEATHS,
    died_while_loading,
    one_line_reason,
    original_error,
)
from ray_abliterate.cluster.replica_actor import ReplicaSpec
from ray_abliterate.errors import ModelError
from ray_abliterate.replica.messages import ModelFacts, UneditedReplicaApi

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often the fleet looks for nodes that came or went."""
TRIES = 3
"""A replica that can't be started so often in a row is given up."""
RETRY_SECONDS = 20.0
"""Pause before a failed start is tried again; doubled each time."""
OVERHEAD_BYTES = 1.5e9
"""Memory of a replica on the CPU besides weights and copies: libraries, activations, logits."""

PlaceKey = tuple[str, int]
"""Id of a node, and the number of a place on it."""


@dataclass
class ReplicaLife:
    """One life of a replica.

    Attributes:
        placement: Where it is, and what it takes.
        handle: Ray's handle of the actor.
        began: Time by the monotonic clock, in seconds.
        ready: Whether it can be used now.
        gone: Whether it died, or is to; it never comes back.
    """

    placement: Placement
    handle: Any
    began: float = field(default_factory=time.monotonic)
    ready: bool = False
    gone: bool = False

    @property
    def label(self) -> str:
        """The name that people read."""
        return self.placement.label


@dataclass
class _PlaceHistory:
    """What is known of a place, over all lives there."""

    placement: Placement
    lives: int = 0
    failures: int = 0
    given_up: bool = False


class Fleet:
    """All replicas of a pool.

    Attributes:
        facts: What the first replica reported about its model; None until one is ready.
        failure: Set once no replica is left, and none will come.
        changed: Set whenever any of this may be different.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        on_ready: Callable[[ReplicaLife], None],
        on_node_lost: Callable[[str], None],
        report: ReportEvent,
    ) -> None:
        """Start nothing yet.

        Args:
            spec: What replicas are made from.
            on_ready: Called with each replica that can be used from now on.
            on_node_lost: Called with the id of each node that has gone.
            report: Called with the name of each event, and its details.
        """
        self._spec, self._on_ready, self._report = spec, on_ready, report
        self._on_node_lost = on_node_lost
        self._registry = spec.registry or ray.get_runtime_context().current_actor
        self._token = secrets.token_hex(2)
        self._places: dict[PlaceKey, _PlaceHistory] = {}
        self._lives: dict[PlaceKey, ReplicaLife] = {}
        self._known_nodes: dict[str, Node] = {}
        self._replica_bytes: float | None = None
        self._demands: list[tuple[Any, Any]] = []
        self._reported_missing = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.facts: ModelFacts | None = None
        self.failure: BaseException | None = None
        self.changed = asyncio.Event()

    @property
    def ready(self) -> int:
        """Number of replicas that can be used now."""
        return sum(life.ready for life in self._lives.values())

    @property
    def layout(self) -> ReplicaLayout:
        """All places, given up or not."""
        return layout_of([place.placement for place in self._places.values()])

    def start(self) -> None:
        """Start replicas everywhere, and keep watching nodes and replicas."""
        self._run(self._watch())

    async def _watch(self) -> None:
        while True:
            try:
                self._compare(await asyncio.to_thread(live_nodes))
            except ModelError as error:
                if self.facts is None:
                    self._fail(error)
                    return
            except Exception as error:  # noqa: BLE001  # watching must go on
                log.warning("the cluster's nodes could not be listed: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    def _compare(self, nodes: tuple[Node, ...]) -> None:
        """Drop what went with its node; start what is missing on the nodes that are alive."""
        alive = {node.id: node for node in nodes}
        for node in set(self._known_nodes) - set(alive):
            lost = [life for life in self._lives.values() if life.placement.node == node]
            name = self._known_nodes.pop(node).name
            self._report("node-lost", node=name, replicas=len(lost))
            for life in lost:
                self.lost(life)
            for key in [key for key in self._places if key[0] == node]:
                del self._places[key]
            self._on_node_lost(node)
        at_first = not self._known_nodes
        for node in set(alive) - set(self._known_nodes):
            if not at_first:
                self._report("node-joined", node=alive[node].name)
            self._known_nodes[node] = alive[node]
        self._fill(nodes)

    def _fill(self, nodes: tuple[Node, ...]) -> None:
        """Start a replica at every place that has none."""
        settings, nodes = self._spec.settings, self._spec.share(nodes)
        broken = {key[0] for key, place in self._places.items() if place.given_up}
        sound = [node for node in nodes if node.id not in broken]
        placements = place_replicas(settings, sound, self._replica_bytes)
        if not broken and not self._spec.patient and self.facts is None:
            refuse_what_does_not_fit(settings, nodes, placements, self._spec.section)
        self._demand(count_unplaced(settings, placements), gpus_per_replica(settings, nodes))
        most = settings.replicas or len(placements) + len(self._places)
        number_on: dict[str, int] = {}
        for placement in placements:
            number_on[placement.node] = number_on.get(placement.node, -1) + 1
            key = (placement.node, number_on[placement.node])
            in_use = sum(not place.given_up for place in self._places.values())
            if key not in self._places and in_use < most:
                taken = {place.placement.index for place in self._places.values()}
                index = next(i for i in range(len(taken) + 1) if i not in taken)
                own = replace(placement, index=index, pool=self._registry, role=self._spec.role)
                self._places[key] = _PlaceHistory(own)
                self._begin(key)

    def _demand(self, count: int, gpus: float) -> None:
        """Show a cluster that grows on demand what is missing.

        Tasks that need what a replica needs, and do nothing, wait for room. They end with this
        process, where a standing request to the autoscaler would outlive a driver that is killed.
        """
        # one may find room, and end, before a replica takes that room: it is needed again
        self._demands = [demand for demand in self._demands if not demand[1].done()]
        if not self._spec.patient or count == len(self._demands):
            return
        if count > self._reported_missing:
            self._report("waiting-for-nodes", missing=count, gpus=gpus)
        self._reported_missing = count
        for task, _ in self._demands[count:]:
            ray.cancel(task)
        name = f"room for one {self._spec.role} {self._token}"
        task = ray.remote(_room).options(num_cpus=0, num_gpus=gpus, max_retries=0, name=name)
        new = [task.remote() for _ in range(count - len(self._demands))]
        self._demands = [*self._demands[:count], *((task, task.future()) for task in new)]

    def _begin(self, key: PlaceKey) -> None:
        """Begin a new life at a place."""
        place = self._places[key]
        place.lives += 1
        placement = place.placement
        name = f"{placement.role}-{placement.index}.{place.lives} {self._token}"
        life = ReplicaLife(placement, self._spec.start(placement, name))
        self._lives[key] = life
        self._run(self._bring_up(key, life))

    async def _bring_up(self, key: PlaceKey, life: ReplicaLife) -> None:
        try:
            facts: ModelFacts = await _result(
                life.handle.call.remote(UneditedReplicaApi.describe.__name__)
            )
            self._refuse_other_weights(facts)
        except (*DEATHS, RayTaskError, ModelError) as error:
            if not life.gone:
                self._could_not_start(key, life, error)
            return
        if life.gone:
            return
        place, first = self._places[key], self.facts is None
        place.failures = 0
        if first:
            self.facts = facts
            self._replica_bytes = OVERHEAD_BYTES + facts.model_bytes + facts.cache_bytes
        life.ready = True
        if place.lives > 1:
            seconds = time.monotonic() - life.began
            self._report("replica-back", replica=life.label, seconds=round(seconds, 2))
        self._on_ready(life)
        self.changed.set()
        if first:
            self._fill(tuple(self._known_nodes.values()))

    def _refuse_other_weights(self, facts: ModelFacts) -> None:
        if self.facts is not None and facts.fingerprint != self.facts.fingerprint:
            raise ModelError(
                "its weights are not those of the first replica; is another version of the model "
                "stored on that node?  Pin model.revision, or make the folders equal."
            )

    def _could_not_start(self, key: PlaceKey, life: ReplicaLife, error: Exception) -> None:
        """Try again later; give the place up after some tries, and the fleet if none is left.

        Before any replica has answered, it is most likely the recipe that is wrong: once all have
        failed, nobody waits for a second try.
        """
        life.gone = True
        if key not in self._places:
            return  # its node has gone meanwhile
        place = self._places[key]
        place.failures += 1
        del self._lives[key]
        ray.kill(life.handle)
        place.given_up = place.failures >= TRIES
        hopeless = all(p.given_up for p in self._places.values()) or (
            self.facts is None and not self._lives
        )
        self._report(
            "replica-failed-to-start",
            replica=life.label,
            reason=one_line_reason(error).splitlines()[0],
            given_up=place.given_up or hopeless,
        )
        if hopeless:
            self._fail(error)
        elif not place.given_up:
            self._run(self._begin_later(key, RETRY_SECONDS * 2 ** (place.failures - 1)))
        self.changed.set()

    async def _begin_later(self, key: PlaceKey, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if key in self._places and key not in self._lives and self.failure is None:
            self._begin(key)

    def lost(self, life: ReplicaLife, why: str = "") -> None:
        """Take a replica that died, or is to, out of rotation, and start another in its place."""
        if life.gone:
            return
        life.gone, life.ready = True, False
        self.changed.set()
        key = next((k for k, known in self._lives.items() if known is life), None)
        if key is None:
            return
        del self._lives[key]
        self._report("replica-lost", replica=life.label, **({"reason": why} if why else {}))
        if key[0] in self._known_nodes:
            self._run(self._begin_later(key, 0.0))

    def _fail(self, error: BaseException) -> None:
        self.failure = _without_wrapping(error)
        self.changed.set()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _room() -> None:
    """Do nothing: a task that Ray could start has found room."""


async def _result(reference: Any) -> Any:
    return await reference


def _without_wrapping(error: BaseException) -> BaseException:
    """Return the error as it was raised in the replica's process."""
    original = original_error(error) if isinstance(error, RayTaskError) else error
    return died_while_loading(original) if isinstance(original, DEATHS) else original
