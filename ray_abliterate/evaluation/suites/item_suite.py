"""What suites that ship have in common: chunks cut from one stream of items, scores summed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from ray_abliterate.errors import PromptSourceError
from ray_abliterate.evaluation.suites.aggregation import AggregatedSuite
from ray_abliterate.evaluation.suites.chunks import ItemSelection, chunked
from ray_abliterate.evaluation.suites.suite import Chunk


@runtime_checkable
class ItemSettings(Protocol):
    """What a section of the recipe has, whatever the suite."""

    @property
    def name(self) -> str:
        """Name of the suite, and of its scores."""

    @property
    def limit(self) -> int | None:
        """The first so many items in all."""

    @property
    def chunk(self) -> int | None:
        """Items of a unit of work; None if the suite says how many."""


S = TypeVar("S", bound=ItemSettings)


class ItemSuite(AggregatedSuite, ABC, Generic[S]):
    """A suite that is made from a section of the recipe: give it `items` and `run`."""

    def __init__(self, settings: S, base: Path = Path()) -> None:
        """
        Args:
            settings: As the recipe has them.
            base: The recipe's folder.
        """
        self.name = settings.name
        self.settings, self.base = settings, base

    @abstractmethod
    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Items with their groups, read as they are asked for; each has an `id` of its own.

        Raises:
            PromptSourceError: one is not usable; names file, line and field.
        """

    def choice(self) -> ItemSelection:
        """Which items are taken."""
        return ItemSelection(limit=self.settings.limit)

    def size(self) -> int:
        """Items of a chunk."""
        return self.settings.chunk or 1

    def nothing(self) -> str:
        """What is wrong if there is no item: what was looked for, and what to check."""
        return "there is nothing to ask.\n  Check its settings."

    def chunks(self) -> Iterator[Chunk]:
        """Group by group, as items are read; see `Suite`.

        Raises:
            PromptSourceError: an item is not usable, or there is none.
        """
        found, choice = False, self.choice()
        taken = choice.taken(self.items())
        for chunk in chunked(self.name, taken, self.size(), choice.per_group):
            found = True
            yield chunk
        if not found:
            raise PromptSourceError(f"suite {self.name!r}: {self.nothing()}")
