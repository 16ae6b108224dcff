"""What suites found of models, kept chunk by chunk as it comes. Files and values, no model.

A folder per run, in it one per model (`base`, `trial-17`), in that a file per suite: a line of JSON
for each chunk. The file's name holds a hash of the suite's settings, so that results of other
settings are not taken for its own; a chunk's fingerprint does the same for its items.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.evaluation.suites.suite import PairedDifference, Suite, SuiteChunk
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.search.score import Score

BASE = "base"
"""Label of the model as it was."""


def label(trial: int | None) -> str:
    """What a model's results are called: the base model's, or a trial's."""
    return BASE if trial is None else f"trial-{trial}"


@dataclass(frozen=True)
class SuiteProgress:
    """What is known of one suite of one model.

    Attributes:
        chunks: Those that are measured.
        wanted: How many there are in all; None while nobody has listed them.
    """

    chunks: tuple[SuiteChunk, ...]
    wanted: int | None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.wanted is not None and len(self.chunks) == self.wanted


@dataclass(frozen=True)
class Finding:
    """A suite's main score of one model, for people.

    Attributes:
        score: The score; None where a suite scores nothing.
        comparison: With the base model, on the chunks that both have.
        whole: Whether nothing is missing.
    """

    score: Score | None
    comparison: PairedDifference | None
    whole: bool


class SuiteResults:
    """The results of a run's models."""

    def __init__(self, folder: Path, suites: Sequence[SuiteSettings]) -> None:
        """Look into a folder; it is made when there is something to write.

        Args:
            folder: Where results are.
            suites: The suites whose results are looked for.
        """
        self._folder = folder
        self._files = {setting.name: f"{setting.name}-{_key(setting)}" for setting in suites}

    @property
    def suites(self) -> tuple[str, ...]:
        """Names of the suites, in order."""
        return tuple(self._files)

    @property
    def labels(self) -> tuple[str, ...]:
        """Models that have results of one of these suites, the base model first."""
        found = {
            file.parent.name
            for stem in self._files.values()
            for file in self._folder.glob(f"*/{stem}.jsonl")
        }
        return tuple(sorted(found, key=lambda name: (name != BASE, len(name), name)))

    def of(self, model: str, suite: str) -> SuiteProgress:
        """What is known; of chunks that were measured twice, the last.

        Raises:
            RunDirectoryError: a line that is not the last is damaged.
        """
        file = self._file(model, suite)
        found: dict[str, SuiteChunk] = {}
        wanted = None
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if "wanted" in entry:
                    wanted = int(entry["wanted"])
                    continue
                chunk = SuiteChunk.from_dict(entry)
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break  # torn when its writer was killed
                raise RunDirectoryError(
                    f"{file}, line {number} is damaged ({error}).\n"
                    "  Delete the line; what it held is measured again."
                ) from None
            found[chunk.chunk] = chunk
        return SuiteProgress(tuple(found.values()), wanted)

    def finding(self, model: str, suite: Suite) -> Finding | None:
        """What a suite says of a model; None if nothing is measured."""
        known, base = self.of(model, suite.name), self.of(BASE, suite.name)
        if not known.chunks:
            return None
        scores = suite.summary(known.chunks)
        both = {chunk.chunk for chunk in known.chunks} & {chunk.chunk for chunk in base.chunks}
        found: tuple[PairedDifference, ...] = ()
        if model != BASE and scores and both:
            sides = ([c for c in side.chunks if c.chunk in both] for side in (base, known))
            found = suite.compare(*sides)
        return Finding(scores[0] if scores else None, found[0] if found else None, known.whole)

    def add(self, model: str, chunk: SuiteChunk) -> None:
        """One more chunk."""
        self._append(model, chunk.suite, chunk.to_dict())

    def close(self, model: str, suite: str, wanted: int) -> None:
        """All chunks are measured: so many there are."""
        self._append(model, suite, {"wanted": wanted})

    def _append(self, model: str, suite: str, entry: dict[str, Any]) -> None:
        file = self._file(model, suite)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":
                    stream.truncate(stream.tell() - _torn(file))
            stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def _file(self, model: str, suite: str) -> Path:
        return self._folder / model / f"{self._files[suite]}.jsonl"


def comparison_text(found: PairedDifference) -> str:
    """The difference from the base model, its interval, and p where it is exact."""
    p = "" if found.p is None else f", p {found.p:.2g}"
    return f"{found.difference:+.3g} [{found.low:+.2g}, {found.high:+.2g}]{p}"


def _torn(file: Path) -> int:
    """Bytes after the last line's end."""
    return len(file.read_bytes().rpartition(b"\n")[2])


def _key(setting: SuiteSettings) -> str:
    return hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:8]
