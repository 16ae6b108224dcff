"""Where replicas go: how many each node holds, and what each takes. Values only, no Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import ModelSettings

THREADS = 8
"""CPU threads of a replica where the recipe leaves it open: more add little to one model, so a
machine with more cores holds more replicas."""
MEMORY_SHARE = 0.7
"""Share of a node's memory that replicas on the CPU may take."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what Ray may use of it.

    Attributes:
        id: Ray's id.
        name: Host name.
        cpus: CPU cores.
        gpus: GPUs.
        memory: Bytes.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float


@dataclass(frozen=True)
class Placement:
    """Where one replica runs. A replica that is lost comes back under the same index.

    Attributes:
        index: Number of the replica.
        node: Id of its node.
        node_name: What people call the node.
        gpus: GPUs it takes.
        cpus: CPUs it takes from Ray's count.
        threads: CPU threads it computes with.
        pool: Handle of the pool that registers what replicas of a node share.
        role: `replica` of the search, or `evaluator`.
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
        """The name that people read."""
        return f"{self.role} {self.index} on {self.node_name}"


@dataclass(frozen=True)
class ReplicaLayout:
    """How many replicas there are, and how many GPUs, CPUs and threads each takes."""

    replicas: int
    gpus: float
    cpus: float
    threads: int


def plan_layout(settings: ModelSettings, cpus: float, gpus: float) -> ReplicaLayout:
    """Lay out replicas on one machine.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    here = [Node("here", "here", cpus, gpus, float("inf"))]
    placements = place_replicas(settings, here)
    refuse_what_does_not_fit(settings, here, placements)
    return layout_of(placements)


def layout_of(placements: Sequence[Placement]) -> ReplicaLayout:
    """Summarise placements by the first of them; replicas differ only where nodes do."""
    first = placements[0]
    return ReplicaLayout(
        len(placements), first.gpus, first.cpus, min(p.threads for p in placements)
    )


def place_replicas(
    settings: ModelSettings, nodes: Sequence[Node], replica_bytes: float | None = None
) -> tuple[Placement, ...]:
    """Return the placements that the recipe wants on these nodes, as far as they fit.

    Without GPUs, and unless the recipe gives a number, each node has one until the memory of a
    replica is known.

    Args:
        settings: The recipe's number of replicas, and what each takes.
        nodes: The machines.
        replica_bytes: Memory of one replica, if it is known.
    """
    gpus = gpus_per_replica(settings, nodes)
    room = {node.id: _room(settings, node, gpus, replica_bytes) for node in nodes}
    chosen = _spread(nodes, room, settings.replicas or sum(room.values()))
    held = {node.id: sum(c.id == node.id for c in chosen) for node in nodes}
    return tuple(
        _place(settings, node, gpus, held[node.id], index) for index, node in enumerate(chosen)
    )


def nodes_for_evaluators(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return what the evaluation's own replicas may take: all GPUs, and half of the cores."""
    return tuple(replace(node, cpus=node.cpus / 2) for node in nodes)


def nodes_left_by_evaluators(evaluators: ModelSettings, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return what the evaluation's own replicas leave of the nodes to the search."""
    placements = place_replicas(evaluators, nodes_for_evaluators(nodes))
    return tuple(_without(node, [p for p in placements if p.node == node.id]) for node in nodes)


def without_gpus(nodes: Sequence[Node], taken: Sequence[tuple[str, float]]) -> tuple[Node, ...]:
    """Return the nodes without GPUs that are taken: pairs of a node's id and a number."""
    free = {node.id: node.gpus for node in nodes}
    for node, gpus in taken:
        if node in free:
            free[node] = round(free[node] - gpus, 6)
    return tuple(replace(node, gpus=free[node.id]) for node in nodes)


def _without(node: Node, placements: Sequence[Placement]) -> Node:
    """Return a node without what its placements take; the rest of a shared card can be used."""
    if not placements:
        return node
    gpus, count = placements[0].gpus, len(placements)
    if 0 < gpus < 1:
        per = int(1 / gpus + 1e-6)
        cards = math.ceil(count / per)
        taken = cards - (1 - (count - (cards - 1) * per) * gpus)
    else:
        taken = gpus * count
    cpus = node.cpus - sum(place.cpus for place in placements)
    return replace(node, cpus=cpus, gpus=round(node.gpus - taken, 6))


def count_unplaced(settings: ModelSettings, placements: Sequence[Placement]) -> int:
    """Count the replicas that the recipe wants (at least one) and that have no placement."""
    return max((settings.replicas or 1) - len(placements), 0)


def refuse_what_does_not_fit(
    settings: ModelSettings,
    nodes: Sequence[Node],
    placements: Sequence[Placement],
    section: str = "model",
) -> None:
    """Refuse a recipe whose replicas don't fit on machines that stay as they are.

    Args:
        settings: How many replicas are wanted, and what each takes.
        nodes: What they may use.
        placements: Those that fit.
        section: The recipe's section with these settings.

    Raises:
        ModelError: the recipe asks for more GPUs than there are.
    """
    gpus, fitting = gpus_per_replica(settings, nodes), len(placements)
    if not count_unplaced(settings, placements):
        return
    if not fitting:
        most = max((node.gpus for node in nodes), default=0.0)
        raise ModelError(
            f"{section}.gpus_per_replica = {gpus:g}, but there are {most:g} GPUs"
            + (" on the largest node" if len(nodes) > 1 else "")
            + ".\n  Lower it, or set it to 0 to run on the CPU."
        )
    present = sum(node.gpus for node in nodes)
    wanted = settings.replicas or 1
    raise ModelError(
        f"{section}.replicas = {wanted} of {gpus:g} GPUs each need {wanted * gpus:g} GPUs, but "
        f"there are {present:g}; {fitting} fit."
    )


def gpus_per_replica(settings: ModelSettings, nodes: Sequence[Node]) -> float:
    """Return the recipe's number, or 1 if there are any GPUs."""
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    return 1.0 if any(node.gpus > 0 for node in nodes) else 0.0


def _room(settings: ModelSettings, node: Node, gpus: float, replica_bytes: float | None) -> int:
    """Return how many replicas a node can hold."""
    if gpus >= 1:
        return int(node.gpus // gpus)
    if gpus:
        # a fraction never spans two cards, and a part of one may be taken
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
    """Take nodes in turn, until there are enough."""
    free = dict(room)
    chosen: list[Node] = []
    while len(chosen) < count and any(free.values()):
        for node in nodes:
            if free[node.id] and len(chosen) < count:
                free[node.id] -= 1
                chosen.append(node)
    return chosen


def _place(settings: ModelSettings, node: Node, gpus: float, held: int, index: int) -> Placement:
    if not gpus and not settings.replicas:
        held = _by_cores(settings, node)  # also before the memory of a replica is known
    threads = settings.threads_per_replica or max(1, int(node.cpus) // held)
    share = 1.0 if gpus else float(threads)
    return Placement(
        index, node.id, node.name, gpus, min(share, max(node.cpus / held, 0.1)), threads
    )
