"""Where replicas go: how many each node holds, and what each takes. Values only, no Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import ModelSettings

THREADS = 8
"""CPU threads of a replica where the recipe leaves it open: more of them add little in one model,
so a machine with more cores holds more replicas."""
MEMORY_SHARE = 0.7
"""Of a node's memory, for replicas on the CPU."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what Ray may use of it; memory in bytes."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float


@dataclass(frozen=True)
class Placement:
    """Where one replica is to be. The index is its name: a replica that is lost comes back as it.

    Attributes:
        index: Number of the replica.
        node: Id of its node.
        node_name: What people call the node.
        gpus: GPUs it takes.
        cpus: CPUs it takes of Ray's count.
        threads: CPU threads it computes with.
        pool: Handle of the pool, once it is started; holds what replicas of a node share.
        role: What it is: a `replica` of the search, or an `evaluator`.
    """

    index: int
    node: str
    node_name: str
    gpus: float
    cpus: float
    threads: int
    pool: Any = None
    role: str = "replica"

    @property
    def label(self) -> str:
        """What people read."""
        return f"{self.role} {self.index} on {self.node_name}"


@dataclass(frozen=True)
class Layout:
    """How many replicas, and what each takes."""

    replicas: int
    gpus: float
    cpus: float
    threads: int


def plan_layout(settings: ModelSettings, cpus: float, gpus: float) -> Layout:
    """Replicas for one machine.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    here = [Node("here", "here", cpus, gpus, float("inf"))]
    places = arrange(settings, here)
    refuse_what_does_not_fit(settings, here, places)
    return layout_of(places)


def layout_of(places: Sequence[Placement]) -> Layout:
    """In short; replicas differ only where nodes do."""
    first = places[0]
    return Layout(len(places), first.gpus, first.cpus, min(p.threads for p in places))


def arrange(
    settings: ModelSettings, nodes: Sequence[Node], replica_bytes: float | None = None
) -> tuple[Placement, ...]:
    """The places that the recipe wants on these nodes, as far as they fit.

    Without GPUs, and unless the recipe says how many, there is one place a node until the memory
    of a replica is known.

    Args:
        settings: What the recipe says of replicas.
        nodes: The machines there are.
        replica_bytes: Memory of one replica, if it is known.
    """
    gpus = gpus_per_replica(settings, nodes)
    room = {node.id: _room(settings, node, gpus, replica_bytes) for node in nodes}
    chosen = _spread(nodes, room, settings.replicas or sum(room.values()))
    held = {node.id: sum(c.id == node.id for c in chosen) for node in nodes}
    return tuple(
        _place(settings, node, gpus, held[node.id], index) for index, node in enumerate(chosen)
    )


def offered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """What the evaluation's own replicas may take: all GPUs, and half of the cores."""
    return tuple(replace(node, cpus=node.cpus / 2) for node in nodes)


def left_by(evaluators: ModelSettings, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """What the evaluation's own replicas leave of the nodes to the search."""
    places = arrange(evaluators, offered(nodes))
    return tuple(_without(node, [p for p in places if p.node == node.id]) for node in nodes)


def without(nodes: Sequence[Node], taken: Sequence[tuple[str, float]]) -> tuple[Node, ...]:
    """The nodes less GPUs that somebody has of them: a node's id, and how many."""
    left = {node.id: node.gpus for node in nodes}
    for node, gpus in taken:
        if node in left:
            left[node] = round(left[node] - gpus, 6)
    return tuple(replace(node, gpus=left[node.id]) for node in nodes)


def _without(node: Node, places: Sequence[Placement]) -> Node:
    """A node less what stands on it; of cards that are shared, the rest of one can be used."""
    if not places:
        return node
    gpus, count = places[0].gpus, len(places)
    if 0 < gpus < 1:
        per = int(1 / gpus + 1e-6)
        cards = math.ceil(count / per)
        taken = cards - (1 - (count - (cards - 1) * per) * gpus)
    else:
        taken = gpus * count
    cpus = node.cpus - sum(place.cpus for place in places)
    return replace(node, cpus=cpus, gpus=round(node.gpus - taken, 6))


def count_unplaced(settings: ModelSettings, places: Sequence[Placement]) -> int:
    """Replicas that the recipe wants (at least one), and that have no place."""
    return max((settings.replicas or 1) - len(places), 0)


def refuse_what_does_not_fit(
    settings: ModelSettings,
    nodes: Sequence[Node],
    places: Sequence[Placement],
    section: str = "model",
) -> None:
    """For machines that stay as they are.

    Args:
        settings: How many are wanted, and what each takes.
        nodes: What there is for them.
        places: Those that fit.
        section: Of the recipe, where that is said.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    gpus, fitting = gpus_per_replica(settings, nodes), len(places)
    if not count_unplaced(settings, places):
        return
    if not fitting:
        most = max((node.gpus for node in nodes), default=0.0)
        raise ModelError(
            f"{section}.gpus_per_replica = {gpus:g}, but there are {most:g} GPUs"
            + (" on the largest node" if len(nodes) > 1 else "")
            + ".\n  Lower it, or set it to 0 to run on the CPU."
        )
    there = sum(node.gpus for node in nodes)
    wanted = settings.replicas or 1
    raise ModelError(
        f"{section}.replicas = {wanted} of {gpus:g} GPUs each need {wanted * gpus:g} GPUs, but "
        f"there are {there:g}; {fitting} fit."
    )


def gpus_per_replica(settings: ModelSettings, nodes: Sequence[Node]) -> float:
    """What the recipe says, or one if there are any."""
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    return 1.0 if any(node.gpus > 0 for node in nodes) else 0.0


def _room(settings: ModelSettings, node: Node, gpus: float, replica_bytes: float | None) -> int:
    """Replicas that a node can hold."""
    if gpus >= 1:
        return int(node.gpus // gpus)
    if gpus:
        # a fraction never spans two cards; others may have taken a part of one
        per, part = int(1 / gpus + 1e-6), node.gpus - int(node.gpus)
        return int(node.gpus) * per + int(part / gpus + 1e-6)
    if settings.replicas:
        return settings.replicas
    if replica_bytes is None:
        return 1
    return max(1, min(_by_cores(settings, node), int(MEMORY_SHARE * node.memory / replica_bytes)))


def _by_cores(settings: ModelSettings, node: Node) -> int:
    return max(1, int(node.cpus) // (settings.threads_per_replica or THREADS))


def _spread(nodes: Sequence[Node], room: dict[str, int], count: int) -> list[Node]:
    """Nodes in turns, until there are enough."""
    left = dict(room)
    chosen: list[Node] = []
    while len(chosen) < count and any(left.values()):
        for node in nodes:
            if left[node.id] and len(chosen) < count:
                left[node.id] -= 1
                chosen.append(node)
    return chosen


def _place(settings: ModelSettings, node: Node, gpus: float, held: int, index: int) -> Placement:
    if not gpus and not settings.replicas:
        held = _by_cores(settings, node)  # also before their memory is known
    threads = settings.threads_per_replica or max(1, int(node.cpus) // held)
    share = 1.0 if gpus else float(threads)
    return Placement(
        index, node.id, node.name, gpus, min(share, max(node.cpus / held, 0.1)), threads
    )
