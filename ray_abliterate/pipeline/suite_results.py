"""Results of suites on models, stored chunk by chunk as they come. Files and values, no model.

A folder per run holds one per model (`base`, `trial-17`), and that a file per suite: a line of JSON
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
"""Label of the unedited model."""


def label(trial: int | None) -> str:
    """Return the name that a model's results go by: the base model's for None, or a trial's."""
    return BASE if trial is None else f"trial-{trial}"


@dataclass(frozen=True)
class SuiteProgress:
    """The chunks of one suite that are stored of one model.

    Attributes:
        chunks: Chunks that have been measured.
        wanted: Chunks of the suite; None while they have not all been listed.
    """

    chunks: tuple[SuiteChunk, ...]
    wanted: int | None

    @property
    def whole(self) -> bool:
        """Whether all chunks of the suite have been measured."""
        return self.wanted is not None and len(self.chunks) == self.wanted


@dataclass(frozen=True)
class Finding:
    """A suite's main score of one model, for people.

    Attributes:
        score: The score; None where a suite scores nothing.
        comparison: Difference from the base model, on the chunks that both have; None for the base
            model itself, and where there is no such chunk.
        whole: Whether all chunks of the suite have been measured.
    """

    score: Score | None
    comparison: PairedDifference | None
    whole: bool


class SuiteResults:
    """A store of suites' results on the models of a run, or on other models, in one folder."""

    def __init__(self, folder: Path, suites: Sequence[SuiteSettings]) -> None:
        """Name the files; the folder is made when there is something to write.

        Args:
            folder: Where results are.
            suites: The suites whose results are stored and read.
        """
        self._folder = folder
        self._files = {setting.name: f"{setting.name}-{_key(setting)}" for setting in suites}

    @property
    def suites(self) -> tuple[str, ...]:
        """Names of the suites, in the order of their settings."""
        return tuple(self._files)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the models that have results of one of these suites, the base model first."""
        labels = {
            file.parent.name
            for stem in self._files.values()
            for file in self._folder.glob(f"*/{stem}.jsonl")
        }
        return tuple(sorted(labels, key=lambda name: (name != BASE, len(name), name)))

    def of(self, model: str, suite: str) -> SuiteProgress:
        """Return what is stored of one suite of one model; of a chunk measured twice, the last.

        Raises:
            RunDirectoryError: a line that is not the last is damaged.
        """
        file = self._file(model, suite)
        chunks: dict[str, SuiteChunk] = {}
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
                    "  Delete the line; its chunk is then measured again."
                ) from None
            chunks[chunk.chunk] = chunk
        return SuiteProgress(tuple(chunks.values()), wanted)

    def finding(self, model: str, suite: Suite) -> Finding | None:
        """Return what a suite says of a model; None if no chunk has been measured."""
        stored, base = self.of(model, suite.name), self.of(BASE, suite.name)
        if not stored.chunks:
            return None
        scores = suite.summary(stored.chunks)
        both = {chunk.chunk for chunk in stored.chunks} & {chunk.chunk for chunk in base.chunks}
        differences: tuple[PairedDifference, ...] = ()
        if model != BASE and scores and both:
            sides = ([c for c in side.chunks if c.chunk in both] for side in (base, stored))
            differences = suite.compare(*sides)
        difference = differences[0] if differences else None
        return Finding(scores[0] if scores else None, difference, stored.whole)

    def add(self, model: str, chunk: SuiteChunk) -> None:
        """Append the result of one chunk to the model's file."""
        self._append(model, chunk.suite, chunk.to_dict())

    def close(self, model: str, suite: str, wanted: int) -> None:
        """Record that all chunks have been measured, and how many there are."""
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


def comparison_text(difference: PairedDifference) -> str:
    """Return the difference from the base model, its interval, and p where it is exact."""
    p = "" if difference.p is None else f", p {difference.p:.2g}"
    interval = f"[{difference.low:+.2g}, {difference.high:+.2g}]"
    return f"{difference.difference:+.3g} {interval}{p}"


def _torn(file: Path) -> int:
    """Return the number of bytes after the last line's end."""
    return len(file.read_bytes().rpartition(b"\n")[2])


def _key(setting: SuiteSettings) -> str:
    return hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:8]
