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
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import RecipeChanged, RunDirectoryError, RunExists, RunNotFound
from ray_abliterate.pipeline.trial_files import TrialFiles
from ray_abliterate.recipe import Recipe, SuiteSettings
from ray_abliterate.search.score import Scorecard

if TYPE_CHECKING:  # torch and pyarrow, which opening a run does without
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.directions.layer_selection import LayerSelection
    from ray_abliterate.directions.residuals.residual_set import Residuals
    from ray_abliterate.directions.residuals.shard_files import ShardFolder
    from ray_abliterate.model.batch_size import Tuning
    from ray_abliterate.pipeline.suite_results import SuiteResults

MODEL_FREE_FILES = {"environment.json", "events.jsonl"}
"""Files that a new recipe makes worthless, if the run never got as far as its model."""
LEFT_BEFORE_THE_MODEL = {
    *MODEL_FREE_FILES, "recipe.toml", "recipe.resolved.json", ".lock", "log.txt",
}  # fmt: skip
"""All that a run leaves whose prompts or model could not be found or loaded."""


@dataclass(frozen=True)
class Baseline:
    """The base model's scores, and how well each layer's direction separates the prompt sets.

    Attributes:
        scorecard: Scores of the unedited model.
        separation: A row per layer, as `layer_separation.separation` gives it.
        best_layer: The layer that separates best.
    """

    scorecard: Scorecard
    separation: tuple[Mapping[str, float], ...]
    best_layer: int


@dataclass(frozen=True)
class RunDirectory(TrialFiles):
    """A folder that holds one run.

        run = RunDirectory.open("runs/my")
        pandas.DataFrame(run.trial_rows())

    Methods named `read_…` open and check a file with each call; keep what they return.
    """

    @classmethod
    def create(cls, path: Path, recipe: Recipe, recipe_text: str) -> "RunDirectory":
        """Create a run directory; a run that never got as far as its model is replaced.

        Args:
            path: The folder; it must be empty or not exist, or hold such a run.
            recipe: The recipe, overrides included.
            recipe_text: Text of the recipe's file.

        Raises:
            RunExists: the folder already holds a run, or other files.
            RunDirectoryError: the folder cannot be written.
        """
        directory = cls(path)
        if cls.holds_run(path):
            if directory._has_begun():
                done, wanted = len(directory.trials()), directory.read_recipe().search.trials
                raise RunExists(
                    f"{path} already holds {done} of {wanted} trials.\n"
                    f"  Continue it with:  ray-abliterate resume {path}\n"
                    "  or choose another folder with --to."
                )
            with directory.locked():
                for name in MODEL_FREE_FILES:
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
        """Return whether the run got as far as its model; if not, another recipe loses nothing."""
        files = {file.name for file in self.path.iterdir()}
        return not files <= LEFT_BEFORE_THE_MODEL or "model" in self.read_environment()

    @classmethod
    def holds_run(cls, path: Path) -> bool:
        """Return whether a folder holds a run."""
        return cls(path)._recipe_file.exists()

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Return the run in a folder.

        Raises:
            RunNotFound: the folder does not hold a run.
        """
        path = Path(path)
        directory = cls(path)
        if not directory._recipe_file.exists():
            near = sorted(p.parent.as_posix() for p in path.parent.glob("*/recipe.resolved.json"))
            runs = f"\n  Runs in the same folder: {', '.join(near)}" if near else ""
            raise RunNotFound(
                f"{path} holds no run (recipe.resolved.json is missing).{runs}\n"
                f"  Start one with:  ray-abliterate run RECIPE --to {path}"
            )
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process during the block.

        Raises:
            RunDirectoryError: another process has locked the run.
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
        """Read and validate the recipe that the run was started with, overrides included.

        Raises:
            RunDirectoryError: the file is damaged or from another version.
        """
        try:
            return Recipe.from_json(self._recipe_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"{self._recipe_file} is damaged or from another version: {error}"
            ) from None

    def pin_revision(self, recipe: Recipe) -> Recipe:
        """Return a recipe with its model at the Hub's commit that the run began with.

        What the recipe names, a branch or nothing, may be another commit by now.
        """
        commit = self.read_environment().get("model", {}).get("revision")
        if commit is None:
            return recipe
        model = recipe.model.model_copy(update={"revision": commit})
        return recipe.model_copy(update={"model": model})

    def extend(self, trials: int) -> None:
        """Set the number of trials that the run is to have in all."""
        recipe = self.read_recipe()
        search = recipe.search.model_copy(update={"trials": trials})
        extended = recipe.model_copy(update={"search": search})
        write_atomically(self._recipe_file, extended.to_json().encode())

    def refuse_changed(self, recipe: Recipe) -> None:
        """Refuse a recipe that differs from the run's own, the number of trials aside.

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
        """Read `environment.json`: versions, device, prompt sets, facts about the model."""
        file = self.path / "environment.json"
        return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}

    def record_facts(self, **facts: Any) -> None:
        """Add facts to `environment.json`, in place of earlier ones of the same name."""
        text = json.dumps({**self.read_environment(), **facts}, indent=2, ensure_ascii=False)
        write_atomically(self.path / "environment.json", text.encode())

    def read_base(self) -> Path:
        """Read where the recipe's folder is, for relative paths.

        Where that folder is gone, the path as it was given counts, from the working directory: a
        job on a cluster has its own copy of the same files each time.
        """
        environment = self.read_environment()
        base = Path(environment.get("base", "."))
        return base if base.is_dir() else Path(environment.get("base_given", "."))

    @property
    def shards(self) -> "ShardFolder":
        """The residuals' files, one for each batch of prompts."""
        from ray_abliterate.directions.residuals.shard_files import ShardFolder

        return ShardFolder(self.path / "residuals")

    def residuals(self, name: str) -> "Residuals | None":
        """Return the residuals of one prompt set; None if they were not saved.

        Raises:
            RunDirectoryError: a file is damaged or missing.
        """
        from ray_abliterate.directions.residuals.residual_set import join
        from ray_abliterate.directions.residuals.shard import DamagedShard

        try:
            shards = list(self.shards.read_all(name))
            return join(shards, self._fingerprint(name)) if shards else None
        except (DamagedShard, ValueError) as error:
            raise RunDirectoryError(
                f"the residuals of {name!r} under {self.shards.path} can't be read: {error}"
            ) from None

    def _fingerprint(self, name: str) -> str:
        """Return the fingerprint of a set's prompts, without those that were filtered out."""
        environment = self.read_environment()
        facts = {**environment.get("prompts", {}), **environment.get("filtered", {})}
        return str(facts.get(name, {}).get("fingerprint", ""))

    def save_directions(self, directions: "Directions") -> None:
        """Save the directions as `directions.safetensors`."""
        write_atomically(self.path / "directions.safetensors", directions.to_bytes())

    def directions(self) -> "Directions | None":
        """Return the directions; None if they were not computed yet."""
        from ray_abliterate.directions.directions import Directions

        data = self.directions_bytes()
        return Directions.from_bytes(data) if data is not None else None

    def directions_bytes(self) -> bytes | None:
        """Return the directions' file as it is; written anew, its bytes might differ in order."""
        file = self.path / "directions.safetensors"
        return file.read_bytes() if file.exists() else None

    def save_baseline(self, baseline: Baseline) -> None:
        """Save the base model's scores as `baseline.json`."""
        values = {
            "scores": baseline.scorecard.to_list(),
            "separation": [dict(layer) for layer in baseline.separation],
            "best_layer": baseline.best_layer,
        }
        write_atomically(self.path / "baseline.json", json.dumps(values, indent=2).encode())

    def baseline(self) -> Baseline | None:
        """Return the base model's scores; None if they were not measured yet."""
        file = self.path / "baseline.json"
        if not file.exists():
            return None
        values = json.loads(file.read_text("utf-8"))
        scorecard = Scorecard.from_list(values["scores"])
        return Baseline(scorecard, tuple(values["separation"]), values["best_layer"])

    def save_selection(self, selection: "LayerSelection") -> None:
        """Save what each layer's direction does to held-out prompts as `layers.json`."""
        text = json.dumps(selection.to_json(), indent=2, allow_nan=False)
        write_atomically(self.path / "layers.json", text.encode())

    def selection(self) -> "LayerSelection | None":
        """Return what each layer's direction does; None if layers were not tried."""
        from ray_abliterate.directions.layer_selection import LayerSelection

        file = self.path / "layers.json"
        return (
            LayerSelection.from_json(json.loads(file.read_text("utf-8"))) if file.exists() else None
        )

    def tuning(self) -> "Tuning | None":
        """Return the batch sizes of the run's replicas; None in a directory of an older version."""
        from ray_abliterate.model.batch_size import Tuning

        recorded = self.read_environment().get("tuning")
        return Tuning(**recorded) if recorded else None

    # Other files

    def suite_results(self, suites: Sequence[SuiteSettings]) -> "SuiteResults":
        """Return the store of what suites measured on this run's models."""
        from ray_abliterate.pipeline.suite_results import SuiteResults

        return SuiteResults(self.path / "evaluations", suites)

    @property
    def tune(self) -> Path:
        """Folder of Ray Tune's own files (TensorBoard events)."""
        return self.path / "tune"

    @property
    def log(self) -> Path:
        """What libraries said while a command worked on the run, command by command."""
        return self.path / "log.txt"

    @property
    def report(self) -> Path:
        """Path of the report, whether it has been written or not."""
        return self.path / "report.html"

    def save_report(self, html: str) -> None:
        """Save the report, a page that needs no other file."""
        write_atomically(self.report, html.encode())
