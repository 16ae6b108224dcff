"""The fleet: replicas are started where there is room, replaced when they die, given up at last.

Lives in the pool's process. A replica is one Ray actor for one life; the next life at the same
place is another actor, so that nothing depends on how Ray restarts and retries.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ray_abliterate.cluster.connection import nodes
from ray_abliterate.cluster.placement import (
    Layout,
    Node,
    Place,
    arrange,
    gpus_per_replica,
    layout_of,
    missing,
    refuse_what_is_missing,
)
from ray_abliterate.cluster.remote_errors import DEATHS, died_while_loading, plain, reason
from ray_abliterate.cluster.replica_actor import Hosting
from ray_abliterate.errors import ModelError

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often the fleet looks for nodes that came or went."""
TRIES = 3
"""A replica that can't be started so often in a row is given up."""
RETRY_SECONDS = 20.0
"""Pause before a failed start is tried again; doubled each time."""
OVERHEAD_BYTES = 1.5e9
"""Of a replica on the CPU beside weights and copies: libraries, activations, base logits."""

Tell = Callable[..., None]


@dataclass
class Member:
    """One life of a replica."""

    place: Place
    handle: Any
    began: float = field(default_factory=time.monotonic)
    ready: bool = False
    gone: bool = False

    @property
    def label(self) -> str:
        """What people read."""
        return self.place.label


@dataclass
class _Post:
    """What is known of a place over all lives there."""

    place: Place
    lives: int = 0
    failures: int = 0
    given_up: bool = False


class Fleet:
    """All replicas of a pool."""

    def __init__(
        self,
        hosting: Hosting,
        on_ready: Callable[[Member], None],
        on_node_lost: Callable[[str], None],
        tell: Tell,
    ) -> None:
        """Nothing is started yet.

        Args:
            hosting: What replicas are made from.
            on_ready: Told of each replica that can be used from now on.
            on_node_lost: Told the id of each node that has gone.
            tell: Told what happened: name of the event, and details.
        """
        self._hosting, self._on_ready, self._tell = hosting, on_ready, tell
        self._on_node_lost = on_node_lost
        self._claims = hosting.claims or ray.get_runtime_context().current_actor
        self._token = secrets.token_hex(2)
        self._posts: dict[tuple[str, int], _Post] = {}
        self._members: dict[tuple[str, int], Member] = {}
        self._known_nodes: dict[str, Node] = {}
        self._replica_bytes: float | None = None
        self._demands: list[tuple[Any, Any]] = []
        self._told_missing = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.facts: Any = None
        """What the first replica says of its model."""
        self.failure: BaseException | None = None
        """Set when no replica is left, and none will come."""
        self.changed = asyncio.Event()
        """Set whenever something of this may be different."""

    @property
    def ready(self) -> int:
        """Replicas that can be used now."""
        return sum(member.ready for member in self._members.values())

    @property
    def layout(self) -> Layout:
        """All places, given up or not."""
        return layout_of([post.place for post in self._posts.values()])

    def start(self) -> None:
        """Start replicas everywhere, and keep looking after them."""
        self._run(self._look_after())

    async def _look_after(self) -> None:
        while True:
            try:
                self._compare(await asyncio.to_thread(nodes))
            except ModelError as error:
                if self.facts is None:
                    self._fail(error)
                    return
            except Exception as error:  # noqa: BLE001  # the look-out must go on
                log.warning("the cluster's nodes could not be listed: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    def _compare(self, there: tuple[Node, ...]) -> None:
        """Drop what went with its node; start what is missing on those that are there."""
        now = {node.id: node for node in there}
        for node in set(self._known_nodes) - set(now):
            lost = [m for m in self._members.values() if m.place.node == node]
            name = self._known_nodes.pop(node).name
            self._tell("node-lost", node=name, replicas=len(lost))
            for member in lost:
                self.lost(member)
            for key in [key for key in self._posts if key[0] == node]:
                del self._posts[key]
            self._on_node_lost(node)
        at_first = not self._known_nodes
        for node in set(now) - set(self._known_nodes):
            if not at_first:
                self._tell("node-joined", node=now[node].name)
            self._known_nodes[node] = now[node]
        self._fill(there)

    def _fill(self, there: tuple[Node, ...]) -> None:
        """Start a replica at every place that has none."""
        settings, there = self._hosting.settings, self._hosting.share(there)
        broken = {key[0] for key, post in self._posts.items() if post.given_up}
        sound = [node for node in there if node.id not in broken]
        places = arrange(settings, sound, self._replica_bytes)
        if not broken and not self._hosting.patient and self.facts is None:
            refuse_what_is_missing(settings, there, places, self._hosting.section)
        self._demand(missing(settings, places), gpus_per_replica(settings, there))
        most = settings.replicas or len(places) + len(self._posts)
        turn: dict[str, int] = {}
        for place in places:
            turn[place.node] = turn.get(place.node, -1) + 1
            key = (place.node, turn[place.node])
            standing = sum(not post.given_up for post in self._posts.values())
            if key not in self._posts and standing < most:
                taken = {post.place.index for post in self._posts.values()}
                index = next(i for i in range(len(taken) + 1) if i not in taken)
                own = replace(place, index=index, pool=self._claims, role=self._hosting.role)
                self._posts[key] = _Post(own)
                self._begin(key)

    def _demand(self, count: int, gpus: float) -> None:
        """Show a cluster that grows on demand what is missing.

        Tasks that need what a replica needs, and do nothing, wait for room. They end with this
        process, where a standing request to the autoscaler would outlive a driver that is killed.
        """
        # one may find room, and end, before a replica takes that room: it is needed again
        self._demands = [demand for demand in self._demands if not demand[1].done()]
        if not self._hosting.patient or count == len(self._demands):
            return
        if count > self._told_missing:
            self._tell("waiting-for-nodes", missing=count, gpus=gpus)
        self._told_missing = count
        for task, _ in self._demands[count:]:
            ray.cancel(task)
        name = f"room for one {self._hosting.role} {self._token}"
        task = ray.remote(_room).options(num_cpus=0, num_gpus=gpus, max_retries=0, name=name)
        more = [task.remote() for _ in range(count - len(self._demands))]
        self._demands = [*self._demands[:count], *((task, task.future()) for task in more)]

    def _begin(self, key: tuple[str, int]) -> None:
        """A new life at a place."""
        post = self._posts[key]
        post.lives += 1
        name = f"{post.place.role}-{post.place.index}.{post.lives} {self._token}"
        member = Member(post.place, self._hosting.start(post.place, name))
        self._members[key] = member
        self._run(self._bring_up(key, member))

    async def _bring_up(self, key: tuple[str, int], member: Member) -> None:
        try:
            facts = await _ready(member.handle.call.remote("describe"))
            self._refuse_other_weights(facts)
        except (*DEATHS, RayTaskError, ModelError) as error:
            if not member.gone:
                self._could_not_start(key, member, error)
            return
        if member.gone:
            return
        post, first = self._posts[key], self.facts is None
        post.failures = 0
        if first:
            self.facts = facts
            self._replica_bytes = OVERHEAD_BYTES + sum(
                getattr(facts, name, 0) for name in ("model_bytes", "cache_bytes")
            )
        member.ready = True
        if post.lives > 1:
            seconds = time.monotonic() - member.began
            self._tell("replica-back", replica=member.label, seconds=round(seconds, 2))
        self._on_ready(member)
        self._changed()
        if first:
            self._fill(tuple(self._known_nodes.values()))

    def _refuse_other_weights(self, facts: Any) -> None:
        own, first = getattr(facts, "fingerprint", ""), getattr(self.facts, "fingerprint", "")
        if self.facts is not None and own != first:
            raise ModelError(
                "its weights are not those of the first replica; is another version of the model "
                "stored on that node?  Pin model.revision, or make the folders equal."
            )

    def _could_not_start(self, key: tuple[str, int], member: Member, error: Any) -> None:
        """Try again later; give the place up after some tries, and the fleet if none is left.

        Before any replica has answered, it is most likely the recipe that is wrong: once all have
        failed, nobody waits for a second try.
        """
        member.gone = True
        if key not in self._posts:
            return  # its node has gone meanwhile
        post = self._posts[key]
        post.failures += 1
        del self._members[key]
        ray.kill(member.handle)
        post.given_up = post.failures >= TRIES
        hopeless = all(p.given_up for p in self._posts.values()) or (
            self.facts is None and not self._members
        )
        self._tell(
            "replica-failed-to-start",
            replica=member.label,
            reason=reason(error).splitlines()[0],
            given_up=post.given_up or hopeless,
        )
        if hopeless:
            self._fail(error)
        elif not post.given_up:
            self._run(self._again(key, RETRY_SECONDS * 2 ** (post.failures - 1)))
        self._changed()

    async def _again(self, key: tuple[str, int], delay: float) -> None:
        await asyncio.sleep(delay)
        if key in self._posts and key not in self._members and self.failure is None:
            self._begin(key)

    def lost(self, member: Member, why: str = "") -> None:
        """A replica died, or is to: out of rotation at once, and another in its place."""
        if member.gone:
            return
        member.gone, member.ready = True, False
        self._changed()
        key = next((k for k, m in self._members.items() if m is member), None)
        if key is None:
            return
        del self._members[key]
        self._tell("replica-lost", replica=member.label, **({"reason": why} if why else {}))
        if key[0] in self._known_nodes:
            self._run(self._again(key, 0.0))

    def _fail(self, error: BaseException) -> None:
        self.failure = _plain(error)
        self._changed()

    def _changed(self) -> None:
        self.changed.set()

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _room() -> None:
    """There is room now."""


async def _ready(reference: Any) -> Any:
    return await reference


def _plain(error: BaseException) -> BaseException:
    """The error as it was raised over there."""
    found = plain(error) if isinstance(error, RayTaskError) else error
    return died_while_loading(found) if isinstance(found, DEATHS) else found
