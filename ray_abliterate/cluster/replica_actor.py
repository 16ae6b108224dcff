"""The process that a replica lives in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.node_store import NodeStore
from ray_abliterate.cluster.placement import Node, Place
from ray_abliterate.cluster.secrets import Secrets
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.recipe import ModelSettings


@dataclass(frozen=True)
class Hosting:
    """What the pool makes replicas from.

    Attributes:
        kind: Class of the process, constructed as `kind(place, *args)`.
        args: Further arguments of its constructor.
        settings: How many, and what each takes.
        patient: The cluster may grow: replicas that it has no room for are asked for and waited
            for. Otherwise they are refused.
        section: Of the recipe, where the settings come from.
        share: What of the nodes is there for these replicas.
        claims: Pool that holds what replicas of a node share; their own if unset.
    """

    kind: Callable[..., Any]
    args: tuple[Any, ...]
    settings: ModelSettings
    patient: bool = False
    section: Literal["model", "evaluation"] = "model"
    share: Callable[[Sequence[Node]], tuple[Node, ...]] = tuple
    claims: Any = None

    @property
    def role(self) -> str:
        """What these processes are called."""
        return "replica" if self.section == "model" else "evaluator"

    def start(self, place: Place, name: str) -> Any:
        """A handle of a new process at a place. Ray never restarts it: the fleet makes another."""
        return (
            ray.remote(self.kind)
            .options(
                name=name,
                num_gpus=place.gpus,
                num_cpus=place.cpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
            )
            .remote(place, *self.args)
        )


class Callee(ABC):
    """What the pool asks of a replica's process."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the replica."""

    def call_by_reference(self, method: str, *args: Any) -> tuple[None, Any]:
        """The same, in two returns: the first tells that it is done, the second stays on this node
        until somebody reads it."""
        return None, self.call(method, *args)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """What a method yields, item by item."""
        yield from self.call(method, *args)


class ReplicaHost(Callee):
    """A replica in a Ray actor. A constructor that fails is told to the first caller."""

    def __init__(
        self, place: Place, name: str, secrets: Secrets, kind: str, args: tuple[Any, ...]
    ) -> None:
        """
        Args:
            place: Where this is.
            name: Of the model, for people.
            secrets: The driver's.
            kind: `module:class` of the replica; imported here, as it brings torch.
            args: Of its constructor, before threads and store.
        """
        secrets.hand_over()
        self._label = f"{place.role}-{place.index} {name}"
        self._replica: Any = None
        self._failure: BaseException | None = None
        module, attribute = kind.split(":")
        make = getattr(import_module(module), attribute)
        try:
            self._replica = make(*args, threads=place.threads, store=NodeStore(place))
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
