"""What a run knows of its exports: where they are, and how their reloaded files scored.

For a quantized search it also holds the scores in full precision, which say how well scores on
quantized weights predict those of the model that is written.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.search.frontier import Trial

EXPORTS_FACT = "exports"
"""Key of the export folders in `environment.json`."""
FULL_PRECISION_FACT = "full_precision"
"""Key of the scores in full precision in `environment.json`."""


@dataclass(frozen=True)
class VerifiedExport:
    """One export that was verified.

    Attributes:
        name: Name of its folder.
        kind: `merged model` or `adapter`.
        scores: For each score: name, value in the trial, value reloaded, whether it is within what
            is allowed.
        reasons: Why the two may differ.
    """

    name: str
    kind: str
    scores: tuple[dict[str, Any], ...]
    reasons: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether every score is the trial's, within what is allowed."""
        return bool(self.scores) and all(score["within"] for score in self.scores)


@dataclass(frozen=True)
class FullPrecisionScore:
    """One score of one trial, on quantized weights and in full precision."""

    trial: int
    name: str
    quantized: float
    full: float


def verified_exports(directory: RunDirectory) -> tuple[VerifiedExport, ...]:
    """Return all verified exports in the run directory, then those elsewhere that still exist."""
    inside = (directory.path / "exports").absolute()
    noted = directory.read_environment().get(EXPORTS_FACT, ())
    files = (Path(path) / "verification.json" for path in noted)
    elsewhere = (file for file in files if file.exists() and file.parent.parent != inside)
    return tuple(map(_read_export, (*sorted(inside.glob("*/verification.json")), *elsewhere)))


def note_export(directory: RunDirectory, to: Path) -> None:
    """Record in the run directory where an export is.

    Raises:
        OSError: the run directory can't be written.
    """
    noted = directory.read_environment().get(EXPORTS_FACT, [])
    if str(to) not in noted:
        directory.record_facts(**{EXPORTS_FACT: [*noted, str(to)]})


def note_full_precision(
    directory: RunDirectory, trial: Trial, scores: Iterable[tuple[str, float, float]]
) -> None:
    """Record what a trial of a quantized search scored in full precision.

    Args:
        directory: The run's.
        trial: The trial that was exported.
        scores: Name, value on quantized weights and value in full precision of each score.
    """
    pairs = {name: [quantized, full] for name, quantized, full in scores}
    noted = directory.read_environment().get(FULL_PRECISION_FACT, {})
    directory.record_facts(**{FULL_PRECISION_FACT: {**noted, str(trial.number): pairs}})


def full_precision_scores(environment: Mapping[str, Any]) -> tuple[FullPrecisionScore, ...]:
    """Return all scores in full precision that a run's environment holds, by trial."""
    noted = environment.get(FULL_PRECISION_FACT, {})
    return tuple(
        FullPrecisionScore(int(number), name, *values)
        for number in sorted(noted, key=int)
        for name, values in noted[number].items()
    )


def quantization_gaps(scores: Iterable[FullPrecisionScore]) -> dict[str, tuple[float, int]]:
    """Return by score the mean distance of quantized from full values, and the trials behind it."""
    gaps: dict[str, list[float]] = {}
    for score in scores:
        gaps.setdefault(score.name, []).append(abs(score.full - score.quantized))
    return {name: (sum(values) / len(values), len(values)) for name, values in gaps.items()}


def _read_export(file: Path) -> VerifiedExport:
    adapter = (file.parent / "adapter_config.json").exists()
    kind = "adapter" if adapter else "merged model"
    try:
        values = json.loads(file.read_text("utf-8"))
        scores = tuple(map(_score, values["scores"]))
        reasons = tuple(str(reason) for reason in values["reasons"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return VerifiedExport(file.parent.name, kind, (), (f"{file.name} can't be read: {error}",))
    return VerifiedExport(file.parent.name, kind, scores, reasons)


def _score(score: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: float(score[key]) for key in ("trial", "reloaded")}
    return {"name": str(score["name"]), "within": score["within"] is True, **values}
