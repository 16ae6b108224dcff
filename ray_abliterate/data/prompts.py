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
    """What the user says, and the system prompt before it (None: the template's own)."""

    user: str
    system: str | None = None

    @property
    def normalized(self) -> str:
        """What the user says, in lower case and with single blanks."""
        return " ".join(self.user.split()).casefold()


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; never empty.

    Raises:
        ValueError: there are no prompts.
    """

    name: str
    prompts: tuple[Prompt, ...]
    origin: str = ""
    """Source, split and revision of the prompts, for `environment.json`."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} is empty")

    @classmethod
    def of(cls, name: str, *users: str) -> "PromptSet":
        """Make a set of prompts without a system prompt."""
        return cls(name, tuple(Prompt(user) for user in users))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the prompts in order, system prompts included."""
        text = json.dumps([[p.system, p.user] for p in self.prompts], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def overlap(self, other: "PromptSet") -> tuple[Prompt, ...]:
        """Return the prompts whose text is in `other` too, case and spacing aside."""
        others = {prompt.normalized for prompt in other.prompts}
        return tuple(prompt for prompt in self.prompts if prompt.normalized in others)

    def subset(self, indices: Iterable[int]) -> "PromptSet":
        """Return the prompts with these indices as a set of their own.

        Raises:
            ValueError: there are no indices.
        """
        return replace(self, prompts=tuple(self.prompts[index] for index in indices))

    def batches(self, size: int) -> Iterator[tuple[int, tuple[Prompt, ...]]]:
        """Yield fixed batches in order, each with its number: the unit of distributed work."""
        for index, start in enumerate(range(0, len(self.prompts), size)):
            yield index, self.prompts[start : start + size]
