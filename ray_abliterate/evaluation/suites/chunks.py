"""A stream of items cut into chunks, group by group. Knows nothing about what the items mean."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.evaluation.suites.suite import Chunk


@dataclass(frozen=True)
class ItemSelection:
    """Which items of a stream are taken.

    Attributes:
        groups: Those of these groups; of all if empty.
        per_group: The first so many of each group.
        limit: The first so many in all.
    """

    groups: tuple[str, ...] = ()
    per_group: int | None = None
    limit: int | None = None

    def taken(
        self, items: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Items with their groups; nothing is read behind the last that is taken, where that can
        be known."""
        seen: dict[str, int] = {}
        total = 0
        for group, item in items:
            wanted = not self.groups or group in self.groups
            if not wanted or seen.get(group, 0) == self.per_group:
                continue
            seen[group] = seen.get(group, 0) + 1
            total += 1
            yield group, item
            full = self.groups and all(seen.get(g) == self.per_group for g in self.groups)
            if total == self.limit or full:
                return


def chunked(
    suite: str,
    items: Iterable[tuple[str, Mapping[str, Any]]],
    size: int,
    per_group: int | None = None,
) -> Iterator[Chunk]:
    """Chunks of one group each, as soon as they or their group are full; the rest at the end.

    At most `size - 1` items of each group are in memory.
    """
    seen: dict[str, int] = {}
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    numbers: dict[str, int] = {}

    def chunk(group: str) -> Chunk:
        number = numbers[group] = numbers.get(group, -1) + 1
        name = f"{group}/{number:05}" if group else f"{number:05}"
        return Chunk(suite, name, group, tuple(waiting.pop(group)))

    for group, item in items:
        waiting.setdefault(group, []).append(item)
        seen[group] = seen.get(group, 0) + 1
        if len(waiting[group]) == size or seen[group] == per_group:
            yield chunk(group)
    for group in sorted(waiting):
        yield chunk(group)


def prompt_items(prompts: PromptSet) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The prompts of a set as items of no group."""
    for number, prompt in enumerate(prompts.prompts):
        yield "", {"id": str(number), "prompt": prompt.user, "system": prompt.system}


def prompts_of(chunk: Chunk) -> list[Prompt]:
    """The prompts of a chunk of such items."""
    return [Prompt(item["prompt"], item.get("system")) for item in chunk.items]
