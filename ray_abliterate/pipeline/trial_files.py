"""What a run directory holds of its trials: the journal, results, events, answers."""

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

    def append(self, trial: Trial) -> None:
        """Add one finished or failed trial to `trials.jsonl`."""
        append_line(self.path / "trials.jsonl", trial.to_json())

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add something that happened to `events.jsonl`."""
        append_line(self.path / "events.jsonl", json.dumps(event, ensure_ascii=False))

    def events(self) -> tuple[dict[str, Any], ...]:
        """All that happened to the run's replicas and files, in order; a torn line is skipped."""
        return read_json_lines(self.path / "events.jsonl")

    def trials(self) -> tuple[Trial, ...]:
        """All trials in order of number; a torn line is skipped, a repeated number counts once."""
        file = self.path / "trials.jsonl"
        found: dict[int, Trial] = {}
        lines = file.read_text("utf-8", errors="replace").split("\n") if file.exists() else []
        for position, line in enumerate(lines, start=1):
            try:
                trial = Trial.from_json(line)
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    log.warning("%s: line %d is torn and was skipped", file, position)
                continue
            found[trial.number] = trial
        return tuple(found[number] for number in sorted(found))

    def trial(self, number: int) -> Trial:
        """One finished trial.

        Raises:
            TrialNotFound: there is none with this number, or it failed.
        """
        trials = {trial.number: trial for trial in self.trials()}
        if number not in trials:
            span = f"0 to {max(trials)}" if trials else "none yet"
            members = ", ".join(str(t.number) for t in Frontier.of(trials.values()).members)
            hint = f"\n  On the frontier: {members}" if members else ""
            raise TrialNotFound(f"{self.path} has no trial {number} (it has {span}).{hint}")
        if trials[number].scorecard is None:
            raise TrialNotFound(f"trial {number} failed: {trials[number].error}")
        return trials[number]

    def save_foreign(self, study: Mapping[str, Any]) -> None:
        """Keep what another tool found of the plans that a run began with."""
        text = json.dumps(study, indent=2, ensure_ascii=False)
        write_atomically(self.path / "imported.json", text.encode())

    def foreign(self) -> dict[str, Any] | None:
        """What another tool found of the run's first plans, if they came from one."""
        file = self.path / "imported.json"
        values: dict[str, Any] | None = (
            json.loads(file.read_text("utf-8")) if file.exists() else None
        )
        return values

    def save_responses(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Keep the answers of one trial, as a Parquet table."""
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        write_atomically(self.path / "responses" / f"{number:06d}.parquet", buffer.getvalue())

    def save_profile(self, table: str, trace: bytes) -> None:
        """Keep where the time of one trial goes."""
        write_atomically(self.path / "profile" / "stages.txt", (table + "\n").encode())
        write_atomically(self.path / "profile" / "trial.json.gz", trace)

    def responses(self, number: int) -> list[dict[str, Any]]:
        """Answers of one trial.

        Raises:
            TrialNotFound: they were not recorded.
        """
        import pyarrow.parquet

        file = self.path / "responses" / f"{number:06d}.parquet"
        if not file.exists():
            raise TrialNotFound(
                f"{self.path} holds no answers of trial {number}.\n"
                "  They are kept by runs with [run] record_responses = true; "
                f"to see some now:  ray-abliterate chat {self.path} --trial {number}"
            )
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
