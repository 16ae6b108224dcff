"""The run directory: everything a run leaves behind.

File names stand here and in `pipeline/trial_files.py`.

Every file is written whole (temporary name, then rename), except the append-only `*.jsonl` and
`study.journal`, whose torn last line is skipped on reading.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ray_abliterate.data.atomic_files import append_line, read_json_lines, write_atomically
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_selection import LayerSelection
from ray_abliterate.directions.residuals.residual_set import Residuals, join
from ray_abliterate.directions.residuals.shard import DamagedShard
from ray_abliterate.directions.residuals.shard_files import ShardFolder
from ray_abliterate.errors import RecipeChanged, RunDirectoryError, RunExists, RunNotFound
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.pipeline.suite_results import SuiteResults
from ray_abliterate.pipeline.trial_files import TrialFiles
from ray_abliterate.recipe import Recipe, SuiteSettings
from ray_abliterate.search.score import Scorecard

OF_NO_MODEL = {"environment.json", "events.jsonl"}
BEFORE_THE_MODEL = OF_NO_MODEL | {"recipe.toml", "recipe.resolved.json", ".lock", "log.txt"}
"""What is there of a run whose prompts or model could not be found or loaded."""


@dataclass(frozen=True)
class Baseline:
    """The base model's scores, and how well each layer tells the two prompt sets apart."""

    scorecard: Scorecard
    separation: tuple[Mapping[str, float], ...]
    """Per layer, as `directions.separation` gives it."""
    best_layer: int


@dataclass(frozen=True)
class RunDirectory(TrialFiles):
    """A folder that holds one run."""

    @classmethod
    def create(cls, path: Path, recipe: Recipe, recipe_text: str) -> "RunDirectory":
        """Start a run in a folder that does not hold one, or none that got as far as its model.

        Raises:
            RunExists: the folder already holds a run, or other files.
            RunDirectoryError: the folder cannot be written.
        """
        directory = cls(path)
        if cls.is_one(path):
            if directory._has_begun():
                done, wanted = len(directory.trials()), directory.read_recipe().search.trials
                raise RunExists(
                    f"{path} already holds {done} of {wanted} trials.\n"
                    f"  Continue it with:  ray-abliterate resume {path}\n"
                    "  or choose another folder with --to."
                )
            with directory.locked():
                for name in OF_NO_MODEL:
                    (path / name).unlink(missing_ok=True)
                directory._save_recipe(recipe, recipe_text)
            return directory
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
            if not occupied:
                directory._save_recipe(recipe, recipe_text)
        except OSError as error:
            raise RunDirectoryError(
                f"{path} cannot be written ({error.strerror}).\n"
                "  Choose a folder you may write to with --to."
            ) from None
        if occupied:
            raise RunExists(f"{path} is not empty and not a run; choose another folder with --to.")
        return directory

    def _save_recipe(self, recipe: Recipe, text: str) -> None:
        write_atomically(self._recipe_file, recipe.to_json().encode())
        write_atomically(self.path / "recipe.toml", text.encode())

    def _has_begun(self) -> bool:
        """Whether the run got as far as its model; if not, another recipe loses nothing."""
        files = {file.name for file in self.path.iterdir()}
        return not files <= BEFORE_THE_MODEL or "model" in self.read_environment()

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether there is a run directory."""
        return cls(path)._recipe_file.exists()

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """The run in a folder.

        Raises:
            RunNotFound: the folder does not hold a run.
        """
        directory = cls(path)
        if not directory._recipe_file.exists():
            near = sorted(p.parent.as_posix() for p in path.parent.glob("*/recipe.resolved.json"))
            runs = f"\n  Runs beside it: {', '.join(near)}" if near else ""
            raise RunNotFound(
                f"{path} holds no run (recipe.resolved.json is missing).{runs}\n"
                f"  Start one with:  ray-abliterate run RECIPE --to {path}"
            )
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one driver.

        Raises:
            RunDirectoryError: another process works on the run.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"{self.path} is in use by another process; wait for it or stop it first."
            ) from None
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written ({error.strerror}).") from None
        try:
            yield
        finally:
            lock.release()

    # The recipe

    @property
    def _recipe_file(self) -> Path:
        return self.path / "recipe.resolved.json"

    def read_recipe(self) -> Recipe:
        """The recipe the run was started with, overrides included."""
        try:
            return Recipe.from_json(self._recipe_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"{self._recipe_file} is damaged or from another version: {error}"
            ) from None

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe with its model at the commit of the Hub that the run began with.

        A branch, or nothing, may name another commit by now.
        """
        commit = self.read_environment().get("model", {}).get("revision")
        if commit is None:
            return recipe
        model = recipe.model.model_copy(update={"revision": commit})
        return recipe.model_copy(update={"model": model})

    def extend(self, trials: int) -> None:
        """Raise the number of trials that the run is to have."""
        recipe = self.read_recipe()
        search = recipe.search.model_copy(update={"trials": trials})
        write_atomically(
            self._recipe_file, recipe.model_copy(update={"search": search}).to_json().encode()
        )

    def refuse_changed(self, recipe: Recipe) -> None:
        """Compare a recipe with the run's own, the number of trials aside.

        Raises:
            RecipeChanged: they differ; the message holds the difference.
        """
        search = recipe.search.model_copy(update={"trials": self.read_recipe().search.trials})
        given = recipe.model_copy(update={"search": search}).to_json().splitlines()
        own = self.read_recipe().to_json().splitlines()
        changes = [
            line
            for line in difflib.unified_diff(own, given, "run", "recipe", n=0, lineterm="")
            if not line.startswith(("@@", "---", "+++"))
        ]
        if changes:
            raise RecipeChanged(
                f"the recipe is not the one {self.path} was started with:\n"
                + "\n".join(f"  {line}" for line in changes)
                + "\n  Start a new run with --to, or resume without the recipe."
            )

    # What is known before the search

    def read_environment(self) -> dict[str, Any]:
        """Versions, device, revisions and what was found about the model."""
        file = self.path / "environment.json"
        values: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        return values

    def note(self, **facts: Any) -> None:
        """Add facts to `environment.json`."""
        text = json.dumps({**self.read_environment(), **facts}, indent=2, ensure_ascii=False)
        write_atomically(self.path / "environment.json", text.encode())

    def read_base(self) -> Path:
        """The recipe's folder, for relative paths.

        Where that folder is gone, it is looked for as it was given, from here: a job on a cluster
        has its own copy of the same files each time.
        """
        known = Path(self.read_environment().get("base", "."))
        return known if known.is_dir() else Path(self.read_environment().get("base_given", "."))

    @property
    def shards(self) -> ShardFolder:
        """Residuals, batch by batch."""
        return ShardFolder(self.path / "residuals")

    def residuals(self, name: str) -> Residuals | None:
        """Residuals of one prompt set, if they were kept.

        Raises:
            RunDirectoryError: a file is damaged or missing.
        """
        try:
            shards = list(self.shards.all(name))
            return join(shards, self._fingerprint(name)) if shards else None
        except (DamagedShard, ValueError) as error:
            raise RunDirectoryError(
                f"the residuals of {name!r} under {self.shards.path} can't be read: {error}"
            ) from None

    def _fingerprint(self, name: str) -> str:
        """Of the prompts of a set that residuals were read of."""
        known = {
            **self.read_environment().get("prompts", {}),
            **self.read_environment().get("filtered", {}),
        }
        return str(known.get(name, {}).get("fingerprint", ""))

    def append_verdicts(self, line: Mapping[str, Any]) -> None:
        """Add what the base model's answers to a batch of prompts show to `verdicts.jsonl`."""
        append_line(self.path / "verdicts.jsonl", json.dumps(line))

    def verdicts(self) -> tuple[dict[str, Any], ...]:
        """All of these, in order; a torn line is skipped."""
        return read_json_lines(self.path / "verdicts.jsonl")

    def save_directions(self, directions: Directions) -> None:
        """Keep the directions."""
        write_atomically(self.path / "directions.safetensors", directions.to_bytes())

    def directions(self) -> Directions | None:
        """The directions, if they were computed."""
        data = self.directions_file()
        return Directions.from_bytes(data) if data is not None else None

    def directions_file(self) -> bytes | None:
        """The file of the directions; written anew, its bytes might be in another order."""
        file = self.path / "directions.safetensors"
        return file.read_bytes() if file.exists() else None

    def save_baseline(self, baseline: Baseline) -> None:
        """Keep the base model's scores."""
        values = {
            "scores": baseline.scorecard.to_list(),
            "separation": [dict(layer) for layer in baseline.separation],
            "best_layer": baseline.best_layer,
        }
        write_atomically(self.path / "baseline.json", json.dumps(values, indent=2).encode())

    def baseline(self) -> Baseline | None:
        """The base model's scores, if they were measured."""
        file = self.path / "baseline.json"
        if not file.exists():
            return None
        values = json.loads(file.read_text("utf-8"))
        scorecard = Scorecard.from_list(values["scores"])
        return Baseline(scorecard, tuple(values["separation"]), values["best_layer"])

    def save_selection(self, selection: LayerSelection) -> None:
        """Keep what layers' directions do to held-out prompts."""
        text = json.dumps(selection.to_json(), indent=2, allow_nan=False)
        write_atomically(self.path / "layers.json", text.encode())

    def selection(self) -> LayerSelection | None:
        """What layers' directions do, if they were tried."""
        file = self.path / "layers.json"
        return (
            LayerSelection.from_json(json.loads(file.read_text("utf-8"))) if file.exists() else None
        )

    def tuning(self) -> Tuning | None:
        """How the run's replicas compute; None in a directory of an older version."""
        known = self.read_environment().get("tuning")
        return Tuning(**known) if known else None

    # Other places

    def suite_results(self, suites: Sequence[SuiteSettings]) -> SuiteResults:
        """What suites found of this run's models."""
        return SuiteResults(self.path / "evaluations", suites)

    @property
    def tune(self) -> Path:
        """Where Ray Tune keeps its own files (TensorBoard events)."""
        return self.path / "tune"

    @property
    def log(self) -> Path:
        """What libraries said while a command worked on the run, command by command."""
        return self.path / "log.txt"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def save_report(self, html: str) -> None:
        """Write the report."""
        write_atomically(self.report, html.encode())
