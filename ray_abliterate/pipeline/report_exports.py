"""What was exported of a run, and what the files scored when they were reloaded."""

import json
from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.report.run_data import Figure

FACT = "exports"
"""Where the folders stand in `environment.json`."""


@dataclass(frozen=True)
class Export:
    """One folder that was verified.

    Attributes:
        name: The folder's.
        kind: `merged model` or `adapter`.
        scores: For each score: name, value in the trial, value reloaded, whether it is within what
            is allowed.
        reasons: Why the two may differ.
    """

    name: str
    kind: str
    scores: tuple[Figure, ...]
    reasons: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Every score is the trial's."""
        return bool(self.scores) and all(score["within"] for score in self.scores)


def exports(directory: RunDirectory) -> tuple[Export, ...]:
    """All verified exports in the run directory, then those elsewhere that are still there."""
    own = (directory.path / "exports").absolute()
    noted = (Path(path) / "verification.json" for path in directory.environment.get(FACT, ()))
    elsewhere = (file for file in noted if file.exists() and file.parent.parent != own)
    return tuple(_export(file) for file in (*sorted(own.glob("*/verification.json")), *elsewhere))


def note_export(directory: RunDirectory, to: Path) -> None:
    """Note in the run directory where an export is.

    Raises:
        OSError: the run directory can't be written.
    """
    known = directory.environment.get(FACT, [])
    if str(to) not in known:
        directory.note(**{FACT: [*known, str(to)]})


def _export(file: Path) -> Export:
    adapter = (file.parent / "adapter_config.json").exists()
    kind = "adapter" if adapter else "merged model"
    try:
        values = json.loads(file.read_text("utf-8"))
        scores = tuple(_score(score) for score in values["scores"])
        reasons = tuple(str(reason) for reason in values["reasons"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Export(file.parent.name, kind, (), (f"{file.name} can't be read: {error}",))
    return Export(file.parent.name, kind, scores, reasons)


def _score(score: Figure) -> Figure:
    values = {key: float(score[key]) for key in ("trial", "reloaded")}
    return {"name": str(score["name"]), "within": score["within"] is True, **values}
