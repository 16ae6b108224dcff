"""Trials of a quantized search whose plans were scored again in full precision, when exported.

Says how well scores on quantized weights predict those of the model that is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_abliterate.export.verification import Verification
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.search.frontier import Trial

FACT = "full_precision"
"""Where it stands in `environment.json`."""


@dataclass(frozen=True)
class Rescored:
    """One score of one trial, on quantized weights and in full precision."""

    trial: int
    name: str
    quantized: float
    full: float


def note_rescored(directory: RunDirectory, trial: Trial, found: Verification) -> None:
    """Note what a verification found in the run directory, if the search was quantized."""
    if not found.quantization:
        return
    own = {score.name: [score.quantized, score.reloaded] for score in found.scores}
    directory.note(**{FACT: {**directory.environment.get(FACT, {}), str(trial.number): own}})


def rescored(environment: Mapping[str, Any]) -> tuple[Rescored, ...]:
    """All that were noted, by trial."""
    noted = environment.get(FACT, {})
    return tuple(
        Rescored(int(number), name, *values)
        for number in sorted(noted, key=int)
        for name, values in noted[number].items()
    )


def gaps(found: tuple[Rescored, ...]) -> dict[str, tuple[float, int]]:
    """By score: the mean distance of quantized from full-precision values, over how many trials."""
    by_name: dict[str, list[float]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(abs(one.full - one.quantized))
    return {name: (sum(all_) / len(all_), len(all_)) for name, all_ in by_name.items()}
