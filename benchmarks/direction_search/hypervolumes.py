"""The hypervolumes of searches, and the arithmetic of comparing them.

Plain numbers; knows neither models nor how plans are chosen.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.statistics import paired_differences, spread
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard

BASE = "mean-difference"
"""What every other method is compared with, seed by seed."""
Losses = tuple[float, ...]


@dataclass(frozen=True)
class SearchJob:
    """One search.

    Attributes:
        model: Name of the model.
        method: Name of the direction method.
        seed: Seed of the sampler, which also draws the prompts that directions come from.
        trials: Plans in all.
        seed_points: Whether it begins with initial points.
        key: Digest of the model, its prompts and the method's settings; a search with another key
            is another search.
    """

    model: str
    method: str
    seed: int
    trials: int
    seed_points: bool
    key: str


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        job: The search.
        found: Rate and KL divergence of each plan in order, None where one failed.
        layer: The layer that the initial points are about.
        cosine: Norm of the planted direction's part that lies in the layer's directions.
        seconds: Time of the search.
    """

    job: SearchJob
    found: tuple[Losses | None, ...]
    layer: int
    cosine: float | None
    seconds: float

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "SearchOutcome":
        """Parse what `to_json` returned."""
        values = json.loads(line)
        found = tuple(None if pair is None else tuple(pair) for pair in values.pop("found"))
        return cls(SearchJob(**values.pop("job")), found, **values)

    def volume(self, reference: Losses, trials: int | None = None) -> float:
        """Return the hypervolume in percent.

        Args:
            reference: Rate and KL divergence; the rectangle from 0 and 0 to here is 100 %.
            trials: Plans that count; all of them if None.
        """
        cards = [(n, losses) for n, losses in enumerate(self.found[:trials]) if losses is not None]
        frontier = Frontier.of(_trial(number, losses) for number, losses in cards)
        return 100 * frontier.hypervolume(reference) / (reference[0] * reference[1])


def _trial(number: int, losses: Losses) -> Trial:
    names = ("rate", "kl")
    scores = tuple(Score(n, x, x, x) for n, x in zip(names, losses, strict=True))
    return Trial(number, Plan.nothing(), Scorecard(scores), 0.0)


def key_of(*facts: Any) -> str:
    """Return a short digest of what decides a result."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def read(file: Path) -> dict[SearchJob, SearchOutcome]:
    """Read the finished searches; a torn last line is left out."""
    outcomes: dict[SearchJob, SearchOutcome] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        try:
            outcome = SearchOutcome.from_json(line)
        except (ValueError, TypeError, KeyError):
            continue
        outcomes[outcome.job] = outcome
    return outcomes


def append(file: Path, outcome: SearchOutcome) -> None:
    """Append a finished search to the file, on a line of its own even after a torn one."""
    torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * torn + outcome.to_json() + "\n")


def by_method(
    outcomes: Iterable[SearchOutcome], references: Mapping[str, Losses]
) -> list[dict[str, Any]]:
    """Return volumes of each model's methods, in their order, and differences to `BASE`.

    Args:
        outcomes: The searches.
        references: Rate and KL divergence that volumes are measured from, by model.
    """
    volumes: dict[tuple[str, str], dict[int, float]] = {}
    cosines: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        group = outcome.job.model, outcome.job.method
        volume = outcome.volume(references[outcome.job.model])
        volumes.setdefault(group, {})[outcome.job.seed] = volume
        if outcome.cosine is not None:
            cosines.setdefault(group, []).append(outcome.cosine)
    return [
        {
            "model": model,
            "method": method,
            "volume": spread(list(by_seed.values()), 2),
            "against": paired_differences(by_seed, volumes.get((model, BASE), {})),
            "cosine": _middle(cosines.get((model, method))),
        }
        for (model, method), by_seed in volumes.items()
    ]


def _middle(values: list[float] | None) -> float | None:
    return round(median(values), 3) if values else None


def by_budget(
    outcomes: Iterable[SearchOutcome], references: Mapping[str, Losses], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Return volumes of each model with and without initial points.

    Args:
        outcomes: The searches.
        references: Rate and KL divergence that volumes are measured from, by model.
        budgets: Numbers of plans after which the same searches are measured.
    """
    volumes: dict[tuple[str, int, bool], dict[int, float]] = {}
    for outcome in outcomes:
        job = outcome.job
        for budget in budgets:
            volume = outcome.volume(references[job.model], budget)
            volumes.setdefault((job.model, budget, job.seed_points), {})[job.seed] = volume
    rows = []
    for model, budget in dict.fromkeys((model, budget) for model, budget, _ in volumes):
        on, off = (volumes.get((model, budget, points), {}) for points in (True, False))
        if on and off:
            rows.append(
                {
                    "model": model,
                    "budget": budget,
                    "with": spread(list(on.values()), 2),
                    "without": spread(list(off.values()), 2),
                    "against": paired_differences(on, off),
                }
            )
    return rows
