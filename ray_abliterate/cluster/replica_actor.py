"""The process that a replica lives in: one Ray actor for each life of a replica.

Knows how a replica is loaded and how its methods are called; nothing about leases or trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.node_store import NodeStore
from ray_abliterate.cluster.placement import Node, Placement
from ray_abliterate.cluster.secrets import Secrets
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.model.optional_packages import hide_optional_packages
from ray_abliterate.recipe import ModelSettings, Recipe

if TYPE_CHECKING:
    from ray_abliterate.data.prompts import PromptSet
    from ray_abliterate.evaluation.scorers.build import Judges
    from ray_abliterate.replica.messages import ReplicaApi, UneditedReplicaApi


@dataclass(frozen=True)
class ReplicaSpec:
    """What the pool makes replicas from.

    Attributes:
        process: Class of the actor, constructed as `process(placement, *args)`.
        args: Further arguments of its constructor.
        settings: How many replicas there are, and what each takes.
        patient: The cluster may grow: replicas that it has no room for are requested and waited
            for. Otherwise the run is refused.
        section: Section of the recipe that holds the settings.
        share: Returns the part of the nodes that these replicas may use.
        registry: Pool whose register of shared arrays they use; their own pool's if None.
    """

    process: Callable[..., ReplicaProcess]
    args: tuple[Any, ...]
    settings: ModelSettings
    patient: bool = False
    section: Literal["model", "evaluation"] = "model"
    share: Callable[[Sequence[Node]], tuple[Node, ...]] = tuple
    registry: Any = None

    @property
    def role(self) -> str:
        """What people call these processes: `replica`, or `evaluator` for the evaluation's own."""
        return "replica" if self.section == "model" else "evaluator"

    def start(self, placement: Placement, name: str) -> Any:
        """Start a process at a placement, and return its handle.

        Ray never restarts it: the fleet makes another one.
        """
        here = NodeAffinitySchedulingStrategy(placement.node, soft=False)
        return (
            ray.remote(self.process)
            .options(
                name=name,
                num_gpus=placement.gpus,
                num_cpus=placement.cpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=here,
            )
            .remote(placement, *self.args)
        )


class ReplicaProcess:
    """The calls that the pool makes into a replica's process.

    The methods that are called are those of `replica`; a stand-in may have them itself.
    """

    @property
    def replica(self) -> Any:
        """The object whose methods are called."""
        return self

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the replica; `method` is the name of one of `ReplicaApi`'s."""
        return getattr(self.replica, method)(*args, **options)

    def call_by_reference(self, method: str, *args: Any, **options: Any) -> tuple[None, Any]:
        """Do the same with two return values.

        The first tells that the call has ended; the second stays on this node until it is fetched.
        """
        return None, self.call(method, *args, **options)

    def stream(self, method: str, *args: Any, **options: Any) -> Iterator[Any]:
        """Yield what a method of the replica yields, item by item."""
        yield from self.call(method, *args, **options)


class ReplicaActor(ReplicaProcess):
    """A replica in a Ray actor. What its constructor raises is raised to the first caller."""

    def __init__(
        self,
        placement: Placement,
        name: str,
        secrets: Secrets,
        load: Callable[..., UneditedReplicaApi],
    ) -> None:
        """Load the replica.

        Args:
            placement: Where this process is, and what it may use.
            name: The model's name, for people.
            secrets: The driver's.
            load: Loads the replica, given `threads` and `store`.
        """
        secrets.hand_over()
        hide_optional_packages()
        self._label = f"{placement.role}-{placement.index} {name}"
        self._replica: UneditedReplicaApi | None = None
        self._failure: BaseException | None = None
        try:
            self._replica = load(threads=placement.threads, store=NodeStore(placement))
        except (RayAbliterateError, RuntimeError, OSError, ValueError, MemoryError) as error:
            self._failure = error

    def __repr__(self) -> str:
        return self._label

    @property
    def replica(self) -> Any:
        """The replica that was loaded.

        Raises:
            BaseException: what its loading raised.
        """
        if self._replica is None:
            assert self._failure is not None
            raise self._failure
        return self._replica


# Functions, so that neither the driver nor the pool's process imports torch to name what is loaded.


def load_replica(
    recipe: Recipe,
    source: str,
    prompts: Mapping[str, PromptSet],
    judges: Judges | None = None,
    *,
    threads: int,
    store: NodeStore,
) -> ReplicaApi:
    """Load a replica of a run; see `Replica`."""
    from ray_abliterate.replica.replica import Replica

    return Replica(recipe, source, prompts, judges, threads, store)


def load_unedited_replica(
    settings: ModelSettings, source: str, *, threads: int, store: NodeStore
) -> UneditedReplicaApi:
    """Load a model that belongs to no run; see `UneditedReplica`."""
    from ray_abliterate.replica.unedited_replica import UneditedReplica

    return UneditedReplica(settings, source, threads, store)
