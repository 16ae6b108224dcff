"""What searches found, and the arithmetic of comparing them; part of `direction_search`.

Plain numbers; knows neither models nor how plans are chosen.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard

BASE = "mean-difference"
"""What every other method is compared with, seed by seed."""
Losses = tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One search: model, method, seed, and how many plans.

    `key` is of the model, its prompts and the method's settings; results of another key are of
    something else.
    """

    model: str
    method: str
    seed: int
    trials: int
    seed_points: bool
    key: str


@dataclass(frozen=True)
class Outcome:
    """What a search found: rate and divergence of each plan in order, None where one failed."""

    job: Job
    found: tuple[Losses | None, ...]
    layer: int
    cosine: float | None
    seconds: float

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Outcome":
        """The inverse of `to_json`."""
        values = json.loads(line)
        found = tuple(None if pair is None else tuple(pair) for pair in values.pop("found"))
        return cls(Job(**values.pop("job")), found, **values)

    def volume(self, reference: Losses, trials: int | None = None) -> float:
        """Percent of the rectangle from the best there is, 0 and 0, to a reference point that the
        frontier of the first `trials` plans covers."""
        cards = [(n, losses) for n, losses in enumerate(self.found[:trials]) if losses is not None]
        frontier = Frontier.of(_trial(number, losses) for number, losses in cards)
        return 100 * frontier.hypervolume(reference) / (reference[0] * reference[1])


def _trial(number: int, losses: Losses) -> Trial:
    names = ("rate", "kl")
    scores = tuple(Score(n, x, x, x) for n, x in zip(names, losses, strict=True))
    return Trial(number, Plan.nothing(), Scorecard(scores), 0.0)


def key_of(*facts: Any) -> str:
    """A short digest of what decides a result."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def read(file: Path) -> dict[Job, Outcome]:
    """The searches that are finished; a torn last line is left out."""
    found: dict[Job, Outcome] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        try:
            outcome = Outcome.from_json(line)
        except (ValueError, TypeError, KeyError):
            continue
        found[outcome.job] = outcome
    return found


def append(file: Path, outcome: Outcome) -> None:
    """Keep a finished search, on a line of its own whatever stands there."""
    torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * torn + outcome.to_json() + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    ends = {"min": min(values), "median": median(values), "max": max(values)}
    return {name: round(value, 2) for name, value in ends.items()}


def against(values: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    """Differences to another way at the same seeds, and at how many of them it was more."""
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not differences:
        return {}
    return {
        **spread(differences),
        "more": sum(difference > 0 for difference in differences),
        "less": sum(difference < 0 for difference in differences),
        "seeds": len(differences),
    }


def by_method(outcomes: Iterable[Outcome], references: dict[str, Losses]) -> list[dict[str, Any]]:
    """Each model's methods, as they come: volumes, and differences to `BASE`."""
    volumes: dict[tuple[str, str], dict[int, float]] = {}
    cosines: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        way = outcome.job.model, outcome.job.method
        volume = outcome.volume(references[outcome.job.model])
        volumes.setdefault(way, {})[outcome.job.seed] = volume
        if outcome.cosine is not None:
            cosines.setdefault(way, []).append(outcome.cosine)
    return [
        {
            "model": model,
            "method": method,
            "volume": spread(list(own.values())),
            "against": against(own, volumes.get((model, BASE), {})),
            "cosine": _middle(cosines.get((model, method))),
        }
        for (model, method), own in volumes.items()
    ]


def _middle(values: list[float] | None) -> float | None:
    return round(median(values), 3) if values else None


def by_budget(
    outcomes: Iterable[Outcome], references: dict[str, Losses], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Each model with and without seed points, after so many plans of the same searches."""
    kept: dict[tuple[str, int, bool], dict[int, float]] = {}
    for outcome in outcomes:
        job = outcome.job
        for budget in budgets:
            volume = outcome.volume(references[job.model], budget)
            kept.setdefault((job.model, budget, job.seed_points), {})[job.seed] = volume
    rows = []
    for model, budget in dict.fromkeys((model, budget) for model, budget, _ in kept):
        on, off = (kept.get((model, budget, way), {}) for way in (True, False))
        if on and off:
            rows.append(
                {
                    "model": model,
                    "budget": budget,
                    "with": spread(list(on.values())),
                    "without": spread(list(off.values())),
                    "against": against(on, off),
                }
            )
    return rows
