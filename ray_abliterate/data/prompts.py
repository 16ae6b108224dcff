"""Prompt sets: named prompts in order, with a fingerprint.

Knows nothing about where prompts come from (`data/prompt_sources.py`) or how a model reads them
(`model/language_model.py`).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Prompt:
    """What the user says, and the system prompt above it (None: the template's own)."""

    user: str
    system: str | None = None

    @property
    def folded(self) -> str:
        """What the user says, case and spacing aside."""
        return " ".join(self.user.split()).casefold()


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; never empty."""

    name: str
    prompts: tuple[Prompt, ...]
    origin: str = ""
    """Where the prompts came from, for `environment.json` (source, split, revision)."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} is empty")

    @classmethod
    def of(cls, name: str, *users: str) -> "PromptSet":
        """A set of plain prompts."""
        return cls(name, tuple(Prompt(user) for user in users))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the prompts in order, system prompts included."""
        text = json.dumps([[p.system, p.user] for p in self.prompts], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def overlap(self, other: "PromptSet") -> tuple[Prompt, ...]:
        """Prompts of this set whose text is in `other` too, case and spacing aside."""
        known = {prompt.folded for prompt in other.prompts}
        return tuple(prompt for prompt in self.prompts if prompt.folded in known)

    def only(self, places: Iterable[int]) -> "PromptSet":
        """The prompts at some places of this set, as a set of their own; one at least."""
        return replace(self, prompts=tuple(self.prompts[place] for place in places))

    def batches(self, size: int) -> Iterator[tuple[int, tuple[Prompt, ...]]]:
        """Fixed batches in order, each with its number: the unit of distributed work."""
        for index, start in enumerate(range(0, len(self.prompts), size)):
            yield index, self.prompts[start : start + size]
