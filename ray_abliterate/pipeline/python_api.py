"""Runs and directions from Python: what the commands do, as functions that return values.

`run_recipe` and `resume_run` start Ray, as the commands do; `compute_directions` works on a model
in this process, without Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ray_abliterate.errors import RecipeError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import DirectionSettings, Recipe
from ray_abliterate.recipe.toml_writer import to_toml

if TYPE_CHECKING:
    from ray_abliterate.data.prompts import PromptSet
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.model.language_model import LanguageModel
    from ray_abliterate.search.frontier import Frontier

PREFIX_PROMPTS = 16
"""Prompts of each set whose answers are compared to find the response prefix, as in a run."""


def run_recipe(
    recipe: Recipe | str | Path,
    to: str | Path,
    progress: Progress | None = None,
    **overrides: object,
) -> "Frontier":
    """Run a recipe in a new run directory, and return the frontier.

        frontier = run_recipe("my.toml", to="runs/my", search__trials=8)
        frontier = run_recipe("my.toml", to="runs/my", **{"search.trials": 8})

    Args:
        recipe: A recipe, or the path of its TOML file. Relative paths in a recipe start from its
            file's folder; those of a `Recipe` from the working directory.
        to: The run directory, which must not hold a run yet; `RunDirectory.open(to)` reads it.
        progress: Display of stages, steps and trials; none if unset.
        **overrides: Settings to change, by their full names as on the command line, with two
            underscores for a dot.

    Raises:
        RecipeError: the recipe can't be read, or a setting is wrong.
        RunExists: the folder holds a run already; `resume_run` continues it.
        RayAbliterateError: anything else that the user can mend; says what. What has been computed
            stays in the directory, and `resume_run` goes on from there.
    """
    from ray_abliterate.pipeline.run import run

    if isinstance(recipe, Recipe):
        base, given = Path.cwd(), recipe
        text = to_toml(recipe.model_dump(mode="json", exclude_none=True))
    else:
        path = Path(recipe)
        base, given = path.parent, Recipe.load(path)
        text = path.read_text(encoding="utf-8")
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    chosen = given.with_overrides(settings) if settings else given
    directory = RunDirectory.create(Path(to), chosen, text)
    return run(chosen, directory, base, progress)


def resume_run(
    directory: RunDirectory | str | Path,
    trials: int | None = None,
    progress: Progress | None = None,
) -> "Frontier":
    """Continue a run that was stopped, or add trials to a finished one; return the frontier.

    Args:
        directory: The run directory, or its path.
        trials: Trials that the run is to have in all; as many as it was to have, if unset.
        progress: Display of stages, steps and trials; none if unset.

    Raises:
        RunNotFound: the folder holds no run.
        RecipeError: the run has more trials already.
        RayAbliterateError: anything else that the user can mend; says what.
    """
    from ray_abliterate.pipeline.run import run

    opened = directory if isinstance(directory, RunDirectory) else RunDirectory.open(directory)
    if trials is not None:
        done = len(opened.trials())
        if trials < max(done, 1):
            raise RecipeError(f"trials = {trials}: {opened.path} has {done} trials already")
        opened.extend(trials)
    return run(opened.read_recipe(), opened, opened.read_base(), progress)


def compute_directions(
    model: "LanguageModel",
    behaviour: "PromptSet | Sequence[str]",
    neutral: "PromptSet | Sequence[str]",
    settings: DirectionSettings | Mapping[str, Any] | None = None,
) -> "Directions":
    """Compute directions on a model in this process, as a run of a recipe would.

        directions = compute_directions(model, cooking, other, {"method": "whitened"})

    Residuals are read at the last token of each prompt, after the response prefix that all answers
    have in common (a closed thinking block, say), unless `skip_common_prefix` is false.

    Args:
        model: The unedited model.
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        settings: The recipe's `[direction]` section, as a value or as a mapping of its settings.

    Returns:
        A unit vector per layer, `"layer hidden"`, and further ones if the method gives several.

    Raises:
        RecipeError: a setting is wrong, or is for runs only (`positions`, `per_component`).
        NoDirection: the sets don't differ in any layer.
        ValueError: a residual is not finite, or the method needs pairs and the sizes differ.
    """
    from ray_abliterate.data.prompts import PromptSet
    from ray_abliterate.directions.compute import directions_from_residuals
    from ray_abliterate.directions.methods.recipe_methods import refuse_unknown_methods
    from ray_abliterate.directions.residuals.residual_set import Residuals

    chosen = _direction_settings(settings)
    refuse_unknown_methods(chosen)
    sets = [
        given if isinstance(given, PromptSet) else PromptSet.of(name, *given)
        for name, given in (("behaviour", behaviour), ("neutral", neutral))
    ]
    with _response_prefix(model, sets, chosen.skip_common_prefix):
        residuals = [Residuals(model.residuals(s.prompts), s.fingerprint) for s in sets]
    return directions_from_residuals(residuals[0], residuals[1], chosen)


def _direction_settings(
    settings: DirectionSettings | Mapping[str, Any] | None,
) -> DirectionSettings:
    try:
        chosen = DirectionSettings.model_validate(settings or {})
    except ValidationError as error:
        problems = [
            f"direction.{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise RecipeError("\n".join(problems)) from None
    if chosen.positions > 1 or chosen.per_component:
        name = "positions" if chosen.positions > 1 else "per_component"
        raise RecipeError(
            f"direction.{name} is for runs only: it needs residuals of more than the last token "
            "of the stream.\n  Use run_recipe, or leave it unset."
        )
    return chosen


@contextmanager
def _response_prefix(
    model: "LanguageModel", sets: "Sequence[PromptSet]", find: bool
) -> Iterator[None]:
    """Set the common prefix of the answers to prompts of both sets for the block."""
    before = model.response_prefix
    model.response_prefix = ()
    try:
        if find:
            prompts = [prompt for s in sets for prompt in s.prompts[:PREFIX_PROMPTS]]
            model.response_prefix = model.find_response_prefix(prompts)
        yield
    finally:
        model.response_prefix = before
