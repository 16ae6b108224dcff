"""Selects items from a stream, and cuts them into chunks, group by group.

Knows nothing about what the items mean.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.evaluation.suites.suite import Chunk


@dataclass(frozen=True)
class ItemSelection:
    """Which items of a stream are used.

    Attributes:
        groups: Only items of these groups; of all groups if empty.
        per_group: At most this many of each group, the first ones; all if None.
        limit: At most this many in total, the first ones; all if None.
    """

    groups: tuple[str, ...] = ()
    per_group: int | None = None
    limit: int | None = None

    def select(
        self, items: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the selected items with their groups.

        Reading ends with the last one that is selected, where that can be known.
        """
        counts: dict[str, int] = {}
        total = 0
        for group, item in items:
            wanted = not self.groups or group in self.groups
            if not wanted or counts.get(group, 0) == self.per_group:
                continue
            counts[group] = counts.get(group, 0) + 1
            total += 1
            yield group, item
            full = self.groups and all(counts.get(g) == self.per_group for g in self.groups)
            if total == self.limit or full:
                return


def chunked(
    suite: str,
    items: Iterable[tuple[str, Mapping[str, Any]]],
    size: int,
    per_group: int | None = None,
) -> Iterator[Chunk]:
    """Yield chunks of one group each, as soon as they or their group are full; the rest at the end.

    At most `size - 1` items of each group are in memory.

    Args:
        suite: Name of the suite.
        items: Items with their groups.
        size: Items of a chunk.
        per_group: Items of a full group, if known.
    """
    counts: dict[str, int] = {}
    pending: dict[str, list[Mapping[str, Any]]] = {}
    numbers: dict[str, int] = {}

    def chunk(group: str) -> Chunk:
        number = numbers[group] = numbers.get(group, -1) + 1
        name = f"{group}/{number:05}" if group else f"{number:05}"
        return Chunk(suite, name, group, tuple(pending.pop(group)))

    for group, item in items:
        pending.setdefault(group, []).append(item)
        counts[group] = counts.get(group, 0) + 1
        if len(pending[group]) == size or counts[group] == per_group:
            yield chunk(group)
    for group in sorted(pending):
        yield chunk(group)


def prompt_items(prompts: PromptSet) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the prompts of a set as items without a group."""
    for number, prompt in enumerate(prompts.prompts):
        yield "", {"id": str(number), "prompt": prompt.user, "system": prompt.system}


def prompts_of(chunk: Chunk) -> list[Prompt]:
    """Return the prompts of a chunk whose items are prompts."""
    return [Prompt(item["prompt"], item.get("system")) for item in chunk.items]
