"""A run of the command line that can be stopped, and resumed to its end."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fault_recovery.outcome import PATIENCE_SECONDS, check, wait_until
from benchmarks.harness.default_search import GOALS

RECIPE = """
[model]
name = "planted"
threads_per_replica = 1
[prompts.behaviour]
builtin = "cooking-train"
split = "[:16]"
[prompts.neutral]
builtin = "other-train"
split = "[:16]"
[search]
trials = {trials}
[run]
dashboard = false
batch_size = 4
[[scorers]]
kind = "keyword-rate"
prompts = {{ builtin = "cooking-heldout", split = "[:8]" }}
markers = ["sorry"]
max_new_tokens = 3
[[scorers]]
kind = "kl-divergence"
prompts = {{ builtin = "other-heldout", split = "[:8]" }}
"""


class CliRun:
    """A run of the planted model by `ray-abliterate run` and `resume`.

    Attributes:
        folder: Working directory of the commands.
        directory: The run directory.
        trials: Trials that the recipe asks for.
        output: What the commands have printed.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, trials: int = 60
    ) -> None:
        """Write the recipe.

        Args:
            folder: An empty folder.
            environment: Further variables of the commands.
            trials: Trials that the recipe asks for.
        """
        self.folder, self.trials = folder, trials
        self.directory = folder / "run"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **(environment or {}),
        }
        self._environment.pop("RAY_ADDRESS", None)
        (folder / "recipe.toml").write_text(RECIPE.format(trials=trials))
        self.output = ""
        self.finished_trials()  # what it imports takes longer than a few trials

    def start(self) -> subprocess.Popen[str]:
        """Start the run, or resume it if it has begun, in a process group of its own."""
        begun = (self.directory / "recipe.resolved.json").exists()
        verb = ["resume", "run"] if begun else ["run", "recipe.toml", "--to", "run"]
        return subprocess.Popen(
            [sys.executable, "-m", "ray_abliterate", *verb],
            cwd=self.folder, env=self._environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finished_trials(self) -> dict[int, str]:
        """Return the trials of the journal that have ended, as JSON, by number."""
        from ray_abliterate.pipeline.directory import RunDirectory
        from ray_abliterate.search.plan import ModelShape
        from ray_abliterate.search.space import SearchSpace
        from ray_abliterate.search.study import finished_trials, open_storage, open_study

        if not (self.directory / "study.journal").exists():
            return {}
        copy = self.folder / "copy.journal"
        shutil.copy(self.directory / "study.journal", copy)
        directory = RunDirectory.open(self.directory)
        facts, recipe = directory.read_environment()["model"], directory.read_recipe()
        shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
        space = SearchSpace.of(shape, recipe.search.space, recipe.edit.norm)
        study = open_study(open_storage(copy), [goal for _, goal in GOALS])
        return {trial.number: trial.to_json() for trial in finished_trials(study, space)}

    def directions(self) -> Any:
        """Return the run's directions as nested lists; None before they are known."""
        from ray_abliterate.pipeline.directory import RunDirectory

        directions = RunDirectory.open(self.directory).directions()
        return directions.vectors.tolist() if directions is not None else None

    def count(self) -> int:
        """Return the number of trials in `trials.jsonl`."""
        file = self.directory / "trials.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def run_to_the_end(self) -> float:
        """Run or resume until all is done; return the seconds until the next trial had finished.

        Raises:
            AssertionError: The command failed, or the study does not have all its trials.
        """
        before, began = self.count(), time.monotonic()
        process = self.start()
        wait_until(lambda: self.count() > before or process.poll() is not None)
        seconds = time.monotonic() - began
        self.output += process.communicate(timeout=PATIENCE_SECONDS)[0]
        check(process.returncode == 0, self.output)
        self.check_all_trials()
        return round(seconds, 2)

    def check_all_trials(self) -> None:
        """Check that the study has every trial, and none too many.

        Raises:
            AssertionError: It has not.
        """
        count = len(self.finished_trials())
        check(count == self.trials, f"{count} trials instead of {self.trials}: {self.output}")

    def lost_trials(self, before: dict[int, str]) -> int:
        """Return how many trials of before are gone or changed: 0.

        Args:
            before: What `finished_trials` returned before the fault.

        Raises:
            AssertionError: There are some.
        """
        now = self.finished_trials()
        lost = [number for number, text in before.items() if now.get(number) != text]
        check(not lost, f"trials {lost} are lost")
        return len(lost)

    def interrupted_trials(self) -> int:
        """Return how many trials were begun, and are done again under another number."""
        lines = (self.directory / "study.journal").read_text().splitlines()
        return sum('"interrupted":true' in line.replace(" ", "") for line in lines)
