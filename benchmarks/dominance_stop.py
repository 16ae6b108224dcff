"""What stopping dominated trials early saves: replays a study that was recorded without it.

    python -m benchmarks.dominance_stop [STUDY] [--slots 1] [--batch 64] [--table FILE]

STUDY is a run directory (best with `run.record_responses = true`, so that it is known when each
answer's marker came), its `trials.jsonl` alone (markers are then taken to come evenly), or a table
that `--table` wrote: numbers only, no texts; the demo's recorded study if none is given. Trials are
taken in order, each against the thresholds of those that had ended when it began; the frontier has
to be that of the complete study.

A step is one token for each answer of a batch that is still open; on most machines time is
proportional to steps. Tokens count each answer's own.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.record import RESULTS
from benchmarks.harness.tables import column_table
from ray_abliterate.evaluation.scorers.early_stopping import score_all
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score

STUDY = RESULTS / "dominance_study.jsonl"
EVEN_TOKENS = 100
"""Length of an answer where answers were not recorded; only shares are computed from it."""


@dataclass(frozen=True)
class RecordedTrial:
    """One trial of a complete study, in numbers.

    Attributes:
        number: The trial's number, which is the order of asking.
        kl: KL divergence in nats.
        hits: Answers that show the behaviour.
        seconds: Time of the trial.
        tokens: Tokens of each whole answer.
        decided: Tokens of each answer after which its marker was there; None if there is none.
    """

    number: int
    kl: float
    hits: int
    seconds: float
    tokens: tuple[int, ...]
    decided: tuple[int | None, ...]

    @property
    def needed(self) -> list[int]:
        """Tokens of each answer in a complete trial: up to its marker, or all."""
        return [marked or whole for marked, whole in zip(self.decided, self.tokens, strict=True)]


class RecordedDivergence:
    """A scorer that returns the recorded KL divergence."""

    name, goal, best = "kl", "minimize", 0.0

    def prepare(self, model: Any) -> None:
        """Nothing."""

    def score(self, trial: Any) -> Score:
        """Return the recorded value."""
        return Score(self.name, *[trial.recorded.kl] * 3)


class RecordedAnswers:
    """A scorer that reads the recorded answers batch by batch, token by token."""

    name, goal, best = "rate", "minimize", 0.0

    def prepare(self, model: Any) -> None:
        """Nothing."""

    def score(self, trial: Any) -> Score:
        """Read all answers."""
        return self.score_until(trial, lambda _loss: False)

    def score_until(self, trial: Any, hopeless: Callable[[float], bool]) -> Score:
        """Read until there are too many hits; the trial counts what was generated."""
        recorded, hits, total = trial.recorded, 0, len(trial.recorded.tokens)
        for batch in batches(total, trial.batch):
            needed = [recorded.needed[i] for i in batch]  # (row,)
            for step in range(1, max(needed) + 1):
                trial.steps += 1
                trial.tokens += sum(step <= tokens for tokens in needed)
                hits += sum(recorded.decided[i] == step for i in batch)
                if hopeless(hits / total):
                    return Score(self.name, hits / total, hits / total, 1.0, bound=True)
        return Score(self.name, *[recorded.hits / total] * 3)


@dataclass
class Replay:
    """A recorded trial that is scored again; scorers are given it in place of a model.

    Attributes:
        recorded: The trial.
        batch: Answers of a batch.
        steps: Steps generated until now.
        tokens: Tokens generated until now.
    """

    recorded: RecordedTrial
    batch: int
    steps: int = 0
    tokens: int = 0

    def scored(self, thresholds: ThresholdSet | None) -> Trial:
        """Return the trial that it would have been with these thresholds."""
        scorers = (RecordedAnswers(), RecordedDivergence())
        card = score_all(scorers, self, thresholds)  # type: ignore[arg-type]
        return Trial(self.recorded.number, Plan.nothing(), card, self.recorded.seconds)


def batches(total: int, size: int) -> Iterator[range]:
    """Yield the indices of each batch, in order."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def replay(study: Sequence[RecordedTrial], slots: int, batch: int) -> dict[str, Any]:
    """Return what a study saves by stopping dominated trials early.

    Args:
        study: The trials of a complete study, in order.
        slots: Trials in flight: a trial knows of those that ended before it began.
        batch: Answers of a batch.
    """
    whole: list[tuple[Replay, Trial]] = []
    stopped: list[Replay] = []
    trials: list[Trial] = []
    for position, recorded in enumerate(study):
        complete, early = Replay(recorded, batch), Replay(recorded, batch)
        ended = trials[: max(0, position - slots + 1)]
        trials.append(early.scored(ThresholdSet.of(ended)))
        whole.append((complete, complete.scored(None)))
        stopped.append(early)
    frontier, expected = Frontier.of(trials), Frontier.of(trial for _, trial in whole)
    pruned = [early for early, trial in zip(stopped, trials, strict=True) if trial.pruned]
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
        "stopped": len(pruned),
        "stopped_before_the_first_token": sum(early.steps == 0 for early in pruned),
        "share_of_steps_saved": saved["steps"],
        "share_of_answer_tokens_saved": saved["tokens"],
        "frontier": [member.number for member in expected.members],
        "same_frontier": frontier == expected,
    }


# Reading


def read_study(path: Path) -> list[RecordedTrial]:
    """Read a study from a run directory, a `trials.jsonl`, or a table that `--table` wrote."""
    if path.is_dir():
        return [recorded_trial(trial, path) for trial in whole_trials(path / "trials.jsonl")]
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    if "scores" in first:
        return [recorded_trial(trial, None) for trial in whole_trials(path)]
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        RecordedTrial(**{**r, "tokens": tuple(r["tokens"]), "decided": tuple(r["decided"])})
        for r in rows
    ]


def whole_trials(file: Path) -> list[Trial]:
    """Return the trials that have scores, in order of number, which is the order of asking.

    Raises:
        SystemExit: Some of them were pruned, so that their scores are bounds.
    """
    trials = [Trial.from_json(line) for line in file.read_text("utf-8").splitlines()]
    if any(trial.pruned for trial in trials):
        raise SystemExit(
            f"{file}: some trials were stopped early, so that their scores are bounds; record a "
            "study with search.dominance_stop = false"
        )
    return sorted((t for t in trials if t.scorecard), key=lambda trial: trial.number)


def recorded_trial(trial: Trial, run: Path | None) -> RecordedTrial:
    """Return the numbers of one trial.

    Args:
        trial: A trial with scores.
        run: The run directory, whose recorded answers are read if it has them; without them,
            markers are taken to come evenly.
    """
    assert trial.scorecard is not None
    rate = next(score for score in trial.scorecard.scores if "hits" in score.detail)
    kl = next(score for score in trial.scorecard.scores if score.unit == "nats per token")
    hits, total = rate.detail["hits"], rate.detail["total"]
    answers = read_answers(run, rate.name, trial.number) if run is not None else None
    if answers is None:
        marked = hits - rate.detail["empty"] - rate.detail["degenerate"]
        even = [math.ceil((i + 1) * EVEN_TOKENS / marked) for i in range(marked)]
        answers = [(EVEN_TOKENS, at) for at in even] + [(EVEN_TOKENS, None)] * (total - marked)
    tokens, decided = zip(*answers, strict=True)
    return RecordedTrial(trial.number, kl.value, hits, trial.seconds, tokens, decided)


def read_answers(run: Path, scorer: str, number: int) -> list[tuple[int, int | None]] | None:
    """Return the tokens of each answer, and of its beginning up to its marker.

    Args:
        run: The run directory.
        scorer: Name of the scorer whose answers are meant.
        number: The trial's.

    Returns:
        None if the run recorded no answers.
    """
    import pyarrow.parquet

    from ray_abliterate.evaluation.scorers.keyword_rate import MARKERS
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.recipe import KeywordRate

    file = run / "responses" / f"{number:06d}.parquet"
    if not file.exists():
        return None
    settings = next(s for s in RunDirectory.open(run).read_recipe().scorers if s.name == scorer)
    assert isinstance(settings, KeywordRate)
    marker_set = settings.markers
    markers = Markers(MARKERS[marker_set] if isinstance(marker_set, str) else marker_set)
    rows = [row for row in pyarrow.parquet.read_table(file).to_pylist() if row["scorer"] == scorer]
    return [(row["tokens"], decided_at(row["answer"], row["tokens"], markers)) for row in rows]


def decided_at(text: str, tokens: int, markers: Markers) -> int | None:
    """Return after how many tokens a marker is there, by its place among the characters."""
    reader = markers.reader()
    for length, character in enumerate(text, start=1):
        if reader.read(character):
            return max(1, math.ceil(length / len(text) * tokens))
    return tokens if reader.finish() else None


def main() -> None:
    """Replay the study, print, save."""
    parser = CLAIM.parser(slots=1)
    parser.add_argument(
        "study",
        type=Path,
        nargs="?",
        default=STUDY,
        help="a run directory, its trials.jsonl, or a table; the demo's recorded study if unset",
    )
    parser.add_argument("--slots", type=int, default=1, help="trials in flight")
    parser.add_argument("--batch", type=int, default=64, help="answers of a batch")
    parser.add_argument("--table", type=Path, help="file to write the study's numbers to")
    options = parser.parse_args()
    study = read_study(options.study)
    if options.table:
        rows = [json.dumps(asdict(recorded)) for recorded in study]
        options.table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    figures = replay(study, options.slots, options.batch)
    CLAIM.save(figures, options)
    for name, value in figures.items():
        print(f"{name}: {value}")


def dominance_table(figures: Figures) -> list[str]:
    """Return what stopping dominated trials early saves."""
    columns = {
        "trials": lambda row: row["trials"],
        "stopped early": lambda row: row["stopped"],
        "before their first token": lambda row: row["stopped_before_the_first_token"],
        "generation steps saved": lambda row: f"{100 * row['share_of_steps_saved']:.0f} %",
        "tokens saved": lambda row: f"{100 * row['share_of_answer_tokens_saved']:.0f} %",
        "frontier": lambda row: "the same" if row["same_frontier"] else "**another**",
    }
    return column_table(columns, [figures])


CLAIM = Claim(
    "dominance_stop",
    "What stopping dominated trials early saves, on a study that was recorded without it.",
    "dominance",
    {"dominance": dominance_table},
)

if __name__ == "__main__":
    main()
