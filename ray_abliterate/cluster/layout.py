"""Where replicas go: how many each node holds, and what each takes. Values only, no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
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
class Place:
    """Where one replica is to be. The index is its name: a replica that is lost comes back as it.

    Attributes:
        index: Number of the replica.
        node: Id of its node.
        node_name: What people call the node.
        gpus: GPUs it takes.
        cpus: CPUs it takes of Ray's count.
        threads: CPU threads it computes with.
        pool: Handle of the pool, once it is started; holds what replicas of a node share.
    """

    index: int
    node: str
    node_name: str
    gpus: float
    cpus: float
    threads: int
    pool: Any = None


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
    refuse_what_is_missing(settings, here, places)
    return layout_of(places)


def layout_of(places: Sequence[Place]) -> Layout:
    """In short; replicas differ only where nodes do."""
    first = places[0]
    return Layout(len(places), first.gpus, first.cpus, min(p.threads for p in places))


def arrange(
    settings: ModelSettings, nodes: Sequence[Node], replica_bytes: float | None = None
) -> tuple[Place, ...]:
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


def missing(settings: ModelSettings, places: Sequence[Place]) -> int:
    """Replicas that the recipe wants (at least one), and that have no place."""
    return max((settings.replicas or 1) - len(places), 0)


def refuse_what_is_missing(
    settings: ModelSettings, nodes: Sequence[Node], places: Sequence[Place]
) -> None:
    """For machines that stay as they are.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    gpus, fitting = gpus_per_replica(settings, nodes), len(places)
    if not missing(settings, places):
        return
    if not fitting:
        most = max((node.gpus for node in nodes), default=0.0)
        raise ModelError(
            f"model.gpus_per_replica = {gpus:g}, but there are {most:g} GPUs"
            + (" on the largest node" if len(nodes) > 1 else "")
            + ".\n  Lower it, or set it to 0 to run on the CPU."
        )
    there = sum(node.gpus for node in nodes)
    wanted = settings.replicas or 1
    raise ModelError(
        f"model.replicas = {wanted} of {gpus:g} GPUs each need {wanted * gpus:g} GPUs, but there "
        f"are {there:g}; {fitting} fit."
    )


def gpus_per_replica(settings: ModelSettings, nodes: Sequence[Node]) -> float:
    """What the recipe says, or one if there are any."""
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def _room(settings: ModelSettings, node: Node, gpus: float, replica_bytes: float | None) -> int:
    """Replicas that a node can hold."""
    if gpus >= 1:
        return int(node.gpus // gpus)
    if gpus:
        return int(node.gpus) * int(1 / gpus + 1e-6)  # a fraction never spans two cards
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


def _place(settings: ModelSettings, node: Node, gpus: float, held: int, index: int) -> Place:
    if not gpus and not settings.replicas:
        held = _by_cores(settings, node)  # also before their memory is known
    threads = settings.threads_per_replica or max(1, int(node.cpus) // held)
    share = 1.0 if gpus else float(threads)
    return Place(index, node.id, node.name, gpus, min(share, max(node.cpus / held, 0.1)), threads)
