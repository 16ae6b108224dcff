"""The base class of the suites that ship: chunks are cut from one stream of items.

Scores are aggregated over their measures.
"""

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
    """What every suite's section of the recipe has."""

    @property
    def name(self) -> str:
        """Return the name of the suite, and of its main score."""

    @property
    def limit(self) -> int | None:
        """Return how many items are used in total, the first ones; all if None."""

    @property
    def chunk(self) -> int | None:
        """Return the items of a chunk; None if the suite decides."""


S = TypeVar("S", bound=ItemSettings)


class ItemSuite(AggregatedSuite, ABC, Generic[S]):
    """A suite that is made from a section of the recipe; subclasses define `items` and `run`."""

    def __init__(self, settings: S, base: Path = Path()) -> None:
        """
        Args:
            settings: The suite's section of the recipe.
            base: The recipe's folder.
        """
        self.name = settings.name
        self.settings, self.base = settings, base

    @abstractmethod
    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield items with their groups, read as they are asked for; each has a unique `id`.

        Raises:
            PromptSourceError: an item is not usable; the message names file, line and field.
        """

    def selection(self) -> ItemSelection:
        """Return which items are used."""
        return ItemSelection(limit=self.settings.limit)

    def chunk_size(self) -> int:
        """Return how many items a chunk has."""
        return self.settings.chunk or 1

    def no_items_message(self) -> str:
        """Return what is wrong if there is no item: what was looked for, and what to check."""
        return "it has no items.\n  Check its settings."

    def chunks(self) -> Iterator[Chunk]:
        """Yield chunks group by group, as their items are read; see `Suite`.

        Raises:
            PromptSourceError: an item is not usable, or there is none.
        """
        any_chunk, selection = False, self.selection()
        selected = selection.select(self.items())
        for chunk in chunked(self.name, selected, self.chunk_size(), selection.per_group):
            any_chunk = True
            yield chunk
        if not any_chunk:
            raise PromptSourceError(f"suite {self.name!r}: {self.no_items_message()}")
