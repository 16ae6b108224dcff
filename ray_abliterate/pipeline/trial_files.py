"""What a run directory holds of its trials: the journal, results, events, answers, verdicts."""

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.data.atomic_files import append_line, read_json_lines, write_atomically
from ray_abliterate.errors import TrialNotFound
from ray_abliterate.search.frontier import Frontier, Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialFiles:
    """A folder that holds the trials of one run."""

    path: Path

    @property
    def journal(self) -> Path:
        """Optuna's journal: the one source of truth for resuming; optuna-dashboard opens it."""
        return self.path / "study.journal"

    def append_trial(self, trial: Trial) -> None:
        """Append a finished or failed trial to `trials.jsonl`."""
        append_line(self.path / "trials.jsonl", trial.to_json())

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append an event of the run's replicas or files to `events.jsonl`."""
        append_line(self.path / "events.jsonl", json.dumps(event, ensure_ascii=False))

    def events(self) -> tuple[dict[str, Any], ...]:
        """Return all events of the run, in order; a torn line is skipped."""
        return read_json_lines(self.path / "events.jsonl")

    def trials(self) -> tuple[Trial, ...]:
        """Return all trials in order of number.

        A torn line is skipped with a warning; of lines with one number the last counts.
        """
        file = self.path / "trials.jsonl"
        trials: dict[int, Trial] = {}
        lines = file.read_text("utf-8", errors="replace").split("\n") if file.exists() else []
        for position, line in enumerate(lines, start=1):
            try:
                trial = Trial.from_json(line)
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    log.warning("%s: line %d is torn and was skipped", file, position)
                continue
            trials[trial.number] = trial
        return tuple(trials[number] for number in sorted(trials))

    def trial(self, number: int) -> Trial:
        """Return one finished trial.

        Raises:
            TrialNotFound: there is none with this number, or it failed.
        """
        trials = {trial.number: trial for trial in self.trials()}
        if number not in trials:
            numbers = f"0 to {max(trials)}" if trials else "none yet"
            members = ", ".join(str(t.number) for t in Frontier.of(trials.values()).members)
            hint = f"\n  On the frontier: {members}" if members else ""
            raise TrialNotFound(f"{self.path} has no trial {number} (it has {numbers}).{hint}")
        if trials[number].scorecard is None:
            raise TrialNotFound(f"trial {number} failed: {trials[number].error}")
        return trials[number]

    def trial_rows(self) -> list[dict[str, Any]]:
        """Return the trials as a table: a row each, all with the same columns, for pandas and csv.

            pandas.DataFrame(run.trial_rows()).set_index("number")

        Columns, in this order; None where a trial has no value:
            number, frontier, pruned, error, seconds, replica: of the trial; `frontier` says whether
                it is a member, `pruned` whether it was stopped early, so that scores are bounds.
            NAME, NAME/low, NAME/high: value and 95 % interval of each score.
            direction_scope, direction_layer, COMPONENT.peak, …: the plan's parameters, under the
                names that the search has for them.
        """
        trials = self.trials()
        members = {trial.number for trial in Frontier.of(trials).members}
        scores = [trial.scorecard.metrics() if trial.scorecard else {} for trial in trials]
        plans = [trial.plan.to_params() for trial in trials]
        names = [name for columns in (scores, plans) for row in columns for name in row]
        empty = dict.fromkeys(names)
        return [
            {
                "number": trial.number,
                "frontier": trial.number in members,
                "pruned": trial.pruned,
                "error": trial.error,
                "seconds": trial.seconds,
                "replica": trial.replica,
                **empty,
                **score,
                **plan,
            }
            for trial, score, plan in zip(trials, scores, plans, strict=True)
        ]

    def append_verdicts(self, line: Mapping[str, Any]) -> None:
        """Append the verdicts on the base model's answers to one batch to `verdicts.jsonl`."""
        append_line(self.path / "verdicts.jsonl", json.dumps(line))

    def verdicts(self) -> tuple[dict[str, Any], ...]:
        """Return all verdicts on the base model's answers, in order; a torn line is skipped."""
        return read_json_lines(self.path / "verdicts.jsonl")

    def save_imported_study(self, study: Mapping[str, Any]) -> None:
        """Save what another tool found about the plans that a run begins with."""
        text = json.dumps(study, indent=2, ensure_ascii=False)
        write_atomically(self.path / "imported.json", text.encode())

    def imported_study(self) -> dict[str, Any] | None:
        """Return what another tool found about the run's first plans; None if they are our own."""
        file = self.path / "imported.json"
        values: dict[str, Any] | None = (
            json.loads(file.read_text("utf-8")) if file.exists() else None
        )
        return values

    def save_responses(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Save the answers of one trial as a Parquet table."""
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        write_atomically(self.path / "responses" / f"{number:06d}.parquet", buffer.getvalue())

    def save_profile(self, table: str, trace: bytes) -> None:
        """Save where the time of one trial goes, as a table and as a gzipped trace."""
        write_atomically(self.path / "profile" / "stages.txt", (table + "\n").encode())
        write_atomically(self.path / "profile" / "trial.json.gz", trace)

    def responses(self, number: int) -> list[dict[str, Any]]:
        """Return the answers of one trial: rows with prompt, answer, verdict and tokens.

        Raises:
            TrialNotFound: they were not recorded.
        """
        import pyarrow.parquet

        file = self.path / "responses" / f"{number:06d}.parquet"
        if not file.exists():
            raise TrialNotFound(
                f"{self.path} holds no answers of trial {number}.\n"
                "  Runs with [run] record_responses = true keep them; to see some now:  "
                f"ray-abliterate chat {self.path} --trial {number}"
            )
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
