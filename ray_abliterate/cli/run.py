"""The verbs that search: `run` and `resume`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_abliterate.cli.options import Overrides, RunFolder, open_run
from ray_abliterate.cli.recipe import shipped_recipes
from ray_abliterate.cli.terminal import console, log_to, say
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import Recipe

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory

commands = typer.Typer()


@commands.command()
def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe; the demo's if unset.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/RECIPE")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile one trial first: a table, and a trace.")
    ] = False,
) -> None:
    """Find the direction, search, and show the frontier."""
    path = recipe or shipped_recipes() / "demo.toml"
    settings = Recipe.load(path, tuple(overrides or ()))
    from ray_abliterate.pipeline.directory import RunDirectory

    folder = to or Path("runs") / path.stem
    directory = RunDirectory.create(folder, settings, path.read_text(encoding="utf-8"))
    _search(settings, directory, path.parent, profile)


@commands.command()
def resume(
    run: RunFolder,
    trials: Annotated[str | None, typer.Option(help="Trials in total, or +50 for 50 more.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Refuse to continue if this is not the run's recipe.")
    ] = None,
) -> None:
    """Continue a run that was stopped, or add trials to a finished one."""
    directory = open_run(run)
    if recipe is not None:
        directory.refuse_changed(Recipe.load(recipe))
    settings, done = directory.read_recipe(), len(directory.trials())
    if trials is not None:
        directory.extend(_total_trials(trials, done, settings.search.trials))
        settings = directory.read_recipe()
    if done >= settings.search.trials:
        say(f"{run} has all of its {settings.search.trials} trials. Add some with:  --trials +50")
    _search(settings, directory, directory.read_base())


def _total_trials(text: str, done: int, planned: int) -> int:
    """Return the total that `--trials` asks for: a number, or `+` and a number of further trials.

    Raises:
        RecipeError: it is neither, or fewer than the run has.
    """
    plus, digits = text.startswith("+"), text.lstrip("+")
    if not digits.isdigit() or int(digits) < 1:
        raise RecipeError(f"--trials {text!r} is not a number of trials; write 250, or +50")
    total = int(digits) + (max(done, planned) if plus else 0)
    if total < done:
        raise RecipeError(f"--trials {text}: the run already has {done} trials")
    return total


def _search(settings: Recipe, directory: "RunDirectory", base: Path, profile: bool = False) -> None:
    """Run the recipe with a display, then show the frontier and what to do next."""
    log_to(directory.log)
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.cli.tables import count_trials, frontier_table
    from ray_abliterate.pipeline.run import run as run_recipe
    from ray_abliterate.report.report import write_report
    from ray_abliterate.search.frontier import Frontier

    output = console()
    interrupted = False
    with open_display(output) as progress:
        try:
            run_recipe(settings, directory, base, progress, profile)
        except KeyboardInterrupt:
            interrupted = True
    trials = directory.trials()
    baseline = directory.baseline()
    frontier = Frontier.of(trials)
    if baseline is not None:
        output.print(frontier_table(frontier, baseline.scorecard))
    print_bound_warnings(directory)
    output.print(f"{count_trials(trials)}. Run directory: {directory.path}")
    if baseline is not None:
        output.print(f"Report: {write_report(directory)}")
    if interrupted or len(trials) < settings.search.trials:
        output.print(f"Continue with:  ray-abliterate resume {directory.path}")
        raise typer.Exit(130)
    if not frontier:
        raise typer.Exit(1)
    output.print(f"Try one:  ray-abliterate chat {directory.path} --trial {frontier.knee.number}")


def print_bound_warnings(directory: "RunDirectory") -> None:
    """Print a warning for each bound of the search space that the frontier lies at."""
    from ray_abliterate.search.bound_warnings import bound_warnings
    from ray_abliterate.search.frontier import Frontier
    from ray_abliterate.search.plan import ModelShape
    from ray_abliterate.search.space import SearchSpace

    model = directory.read_environment().get("model")
    if model is None:
        return
    shape = ModelShape(model["layers"], model["hidden"], tuple(model["components"]))
    recipe = directory.read_recipe()
    space = SearchSpace.of(shape, recipe.search.space, recipe.edit.norm)
    for warning in bound_warnings(Frontier.of(directory.trials()), space):
        console().print(f"warning: {warning}", markup=False)
