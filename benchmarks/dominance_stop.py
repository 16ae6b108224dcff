"""What the dominance stop saves: replays a study that was recorded without it.

    python -m benchmarks.dominance_stop STUDY [--slots 1] [--batch 64] [--table FILE]

STUDY is a run directory (best with `run.record_responses = true`, so that it is known when each
answer's marker came), its `trials.jsonl` alone (markers are then taken to come evenly), or a table
that `--table` wrote: numbers only, no texts. Trials are taken in order, each against the bar of
those that had ended when it began; the frontier has to be that of the complete study.

A step is one token for each answer of a batch that is still open; that is what time goes by on most
machines. Tokens count each answer's own.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.search.dominance import Bar, score_all
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score

EVEN_TOKENS = 100
"""Length of an answer where answers were not recorded; only shares are read off it."""


@dataclass(frozen=True)
class Recorded:
    """One trial of a complete study, in numbers."""

    number: int
    kl: float
    hits: int
    seconds: float
    tokens: tuple[int, ...]
    """Tokens of each whole answer."""
    decided: tuple[int | None, ...]
    """Tokens of each answer after which its marker was there; None if there is none."""

    @property
    def needed(self) -> list[int]:
        """Tokens of each answer without the stop: up to its marker, or all."""
        return [own or whole for own, whole in zip(self.decided, self.tokens, strict=True)]


class Divergence:
    """The recorded divergence."""

    name, goal, best = "kl", "minimize", 0.0

    def prepare(self, model: Any) -> None:
        """Nothing."""

    def score(self, trial: Any) -> Score:
        """As it was."""
        return Score(self.name, *[trial.recorded.kl] * 3)


class Answers:
    """The recorded answers, read batch by batch, token by token."""

    name, goal, best = "rate", "minimize", 0.0

    def prepare(self, model: Any) -> None:
        """Nothing."""

    def score(self, trial: Any) -> Score:
        """In full."""
        return self.score_until(trial, lambda _loss: False)

    def score_until(self, trial: Any, hopeless: Callable[[float], bool]) -> Score:
        """Until there are too many hits; the trial notes what was generated."""
        recorded, hits, total = trial.recorded, 0, len(trial.recorded.tokens)
        for batch in batches(total, trial.batch):
            needed = [recorded.needed[i] for i in batch]
            for step in range(1, max(needed) + 1):
                trial.steps += 1
                trial.tokens += sum(step <= own for own in needed)
                hits += sum(recorded.decided[i] == step for i in batch)
                if hopeless(hits / total):
                    return Score(self.name, hits / total, hits / total, 1.0, bound=True)
        return Score(self.name, *[recorded.hits / total] * 3)


@dataclass
class Replay:
    """A recorded trial, scored again; stands where scorers expect a model."""

    recorded: Recorded
    batch: int
    steps: int = 0
    tokens: int = 0

    def scored(self, bar: Bar | None) -> Trial:
        """The trial that it would have been."""
        card = score_all((Answers(), Divergence()), self, bar)  # type: ignore[arg-type]
        return Trial(self.recorded.number, Plan.nothing(), card, self.recorded.seconds)


def batches(total: int, size: int) -> Iterator[range]:
    """Rows of each batch, in order."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def replay(study: Sequence[Recorded], slots: int, batch: int) -> dict[str, Any]:
    """The study with the stop beside the study without."""
    whole, stopped, trials = [], [], []
    for position, recorded in enumerate(study):
        complete, early = Replay(recorded, batch), Replay(recorded, batch)
        ended = trials[: max(0, position - slots + 1)]
        trials.append(early.scored(Bar.of(ended)))
        whole.append((complete, complete.scored(None)))
        stopped.append(early)
    found, expected = Frontier.of(trials), Frontier.of(trial for _, trial in whole)
    bounded = [early for early, trial in zip(stopped, trials, strict=True) if trial.bounded]
    saved = {
        unit: round(
            1 - sum(getattr(s, unit) for s in stopped) / sum(getattr(c, unit) for c, _ in whole), 3
        )
        for unit in ("steps", "tokens")
    }
    return {
        "trials": len(study),
        "slots": slots,
        "batch": batch,
        "stopped": len(bounded),
        "stopped_before_the_first_token": sum(early.steps == 0 for early in bounded),
        "share_of_steps_saved": saved["steps"],
        "share_of_answer_tokens_saved": saved["tokens"],
        "frontier": [member.number for member in expected.members],
        "same_frontier": found == expected,
    }


# Reading


def read_study(path: Path) -> list[Recorded]:
    """A run directory, a `trials.jsonl`, or a table."""
    if path.is_dir():
        return [recorded_of(trial, path) for trial in whole_trials(path / "trials.jsonl")]
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    if "scores" in first:
        return [recorded_of(trial, None) for trial in whole_trials(path)]
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Recorded(**{**r, "tokens": tuple(r["tokens"]), "decided": tuple(r["decided"])})
        for r in rows
    ]


def whole_trials(file: Path) -> list[Trial]:
    """The trials that have scores; in order of number, which is the order of asking."""
    trials = [Trial.from_json(line) for line in file.read_text("utf-8").splitlines()]
    if any(trial.bounded for trial in trials):
        raise SystemExit(f"{file}: the study was itself stopped early; record one without the stop")
    return sorted((t for t in trials if t.scorecard), key=lambda trial: trial.number)


def recorded_of(trial: Trial, run: Path | None) -> Recorded:
    """The numbers of one trial."""
    assert trial.scorecard is not None
    rate = next(score for score in trial.scorecard.scores if "hits" in score.detail)
    kl = next(score for score in trial.scorecard.scores if score.unit == "nats per token")
    hits, total = rate.detail["hits"], rate.detail["total"]
    known = answers_of(run, rate.name, trial.number) if run is not None else None
    if known is None:
        marked = hits - rate.detail["empty"] - rate.detail["degenerate"]
        even = [math.ceil((i + 1) * EVEN_TOKENS / marked) for i in range(marked)]
        known = [(EVEN_TOKENS, at) for at in even] + [(EVEN_TOKENS, None)] * (total - marked)
    tokens, decided = zip(*known, strict=True)
    return Recorded(trial.number, kl.value, hits, trial.seconds, tokens, decided)


def answers_of(run: Path, scorer: str, number: int) -> list[tuple[int, int | None]] | None:
    """Tokens of each answer, and of its beginning that holds a marker; None if not recorded."""
    import pyarrow.parquet

    from ray_abliterate.evaluation.scorers.keyword_rate import MARKERS
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.recipe import KeywordRate

    file = run / "responses" / f"{number:06d}.parquet"
    if not file.exists():
        return None
    settings = next(s for s in RunDirectory.open(run).recipe.scorers if s.name == scorer)
    assert isinstance(settings, KeywordRate)
    given = settings.markers
    markers = Markers(MARKERS[given] if isinstance(given, str) else given)
    rows = [row for row in pyarrow.parquet.read_table(file).to_pylist() if row["scorer"] == scorer]
    return [(row["tokens"], decided_at(row["answer"], row["tokens"], markers)) for row in rows]


def decided_at(text: str, tokens: int, markers: Markers) -> int | None:
    """Tokens after which the marker is there, by its place among the characters."""
    reader = markers.reader()
    for place, character in enumerate(text, start=1):
        if reader.read(character):
            return max(1, math.ceil(place / len(text) * tokens))
    return tokens if reader.finish() else None


def main() -> None:
    """Replay, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--slots", type=int, default=1, help="trials in flight")
    parser.add_argument("--batch", type=int, default=64, help="answers of a batch")
    parser.add_argument("--table", type=Path, help="write the study's numbers here")
    options = parser.parse_args()
    study = read_study(options.study)
    if options.table:
        rows = [json.dumps(asdict(recorded)) for recorded in study]
        options.table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    figures = replay(study, options.slots, options.batch)
    print(save("dominance", figures))
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
