"""The command line: verbs to calls. Heavy modules are imported where they are used."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_abliterate.cli.chat_and_serve import chat, serve
from ray_abliterate.cli.directions import directions, residuals
from ray_abliterate.cli.evaluate import evaluate
from ray_abliterate.cli.export import export, import_heretic, push, reproduce
from ray_abliterate.cli.options import Overrides, RunFolder
from ray_abliterate.errors import RayAbliterateError, RecipeError
from ray_abliterate.recipe import Recipe

app = typer.Typer(
    name="ray-abliterate",
    help="Find the direction of a behaviour in a language model, and the weight edit that removes "
    "it and little else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def configs() -> Path:
    """The recipes that ship: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.exists() else Path(__file__).parents[2] / "configs"


@app.command()
def init(
    to: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="Hub name or folder of the model.")] = None,
    like: Annotated[str, typer.Option(help="The recipe to start from.")] = "refusal",
) -> None:
    """Write a commented recipe to start from."""
    known = {file.stem: file for file in sorted(configs().glob("*.toml"))}
    if like not in known:
        raise RecipeError(f"there is no recipe {like!r}; --like takes one of {', '.join(known)}")
    if to.exists():
        raise RecipeError(f"{to} is there already; choose another name, or remove it first")
    text = known[like].read_text(encoding="utf-8")
    if model is not None:
        lines = text.splitlines(keepends=True)
        place = next(i for i, line in enumerate(lines) if line.startswith("name = "))
        lines[place] = f'name = "{model}"\n'
        text = "".join(lines)
    Recipe.parse(text, to.name)
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{to} cannot be written ({error.strerror})") from None
    typer.echo(f"{to} written. Check it with:  ray-abliterate doctor {to}")


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to check, too.")] = None,
) -> None:
    """Check this machine, and whether a recipe can run on it."""
    from ray_abliterate.cli.doctor import examine
    from ray_abliterate.cli.progress_display import console

    loaded = Recipe.load(recipe) if recipe else None
    raise typer.Exit(examine(loaded, recipe.parent if recipe else Path(), console()))


@app.command()
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
    path = recipe or configs() / "demo.toml"
    settings = Recipe.load(path, tuple(overrides or ()))
    from ray_abliterate.pipeline.directory import RunDirectory

    folder = to or Path("runs") / path.stem
    directory = RunDirectory.create(folder, settings, path.read_text(encoding="utf-8"))
    _go(settings, directory, path.parent, profile)


@app.command()
def resume(
    run: RunFolder,
    trials: Annotated[
        str | None, typer.Option(help="Trials in all, or +50 for so many more.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Refuse to go on if this is not the run's recipe.")
    ] = None,
) -> None:
    """Go on with a run that was stopped, or add trials to a finished one."""
    from ray_abliterate.pipeline.directory import RunDirectory

    directory = RunDirectory.open(run)
    if recipe is not None:
        directory.refuse_changed(Recipe.load(recipe))
    if trials is not None:
        directory.extend(_wanted(trials, len(directory.trials()), directory.read_recipe().search.trials))
    settings = directory.read_recipe()
    if len(directory.trials()) >= settings.search.trials:
        typer.echo(f"{run} has all of its {settings.search.trials} trials; add some: --trials +50")
    _go(settings, directory, directory.read_base())


def _wanted(text: str, done: int, planned: int) -> int:
    plus, digits = text.startswith("+"), text.lstrip("+")
    if not digits.isdigit() or int(digits) < 1:
        raise RecipeError(f"--trials {text!r} is not a number of trials; write 250, or +50")
    total = int(digits) + (max(done, planned) if plus else 0)
    if total < done:
        raise RecipeError(f"--trials {text}: the run has {done} trials already")
    return total


def _go(settings: Recipe, directory: Any, base: Path, profile: bool = False) -> None:
    """Run with a display, then show what came of it."""
    from ray_abliterate.cli.progress_display import console, count_trials, frontier_table, watching
    from ray_abliterate.pipeline.run import run as run_recipe
    from ray_abliterate.report.report import write_report

    output = console()
    interrupted = False
    with watching(output) as progress:
        try:
            run_recipe(settings, directory, base, progress, profile)
        except KeyboardInterrupt:
            interrupted = True
    trials = directory.trials()
    baseline = directory.baseline()
    frontier = _frontier(trials)
    if baseline is not None:
        output.print(frontier_table(frontier, baseline.scorecard))
    for warning in _bound_warnings(directory, frontier):
        output.print(f"warning: {warning}", markup=False)
    missing = settings.search.trials - len(trials)
    output.print(f"{count_trials(trials)}. Run directory: {directory.path}")
    if baseline is not None:
        output.print(f"Report: {write_report(directory)}")
    if interrupted or missing > 0:
        output.print(f"Go on with:  ray-abliterate resume {directory.path}")
        raise typer.Exit(130)
    if not frontier:
        raise typer.Exit(1)
    output.print(f"Try one:  ray-abliterate chat {directory.path} --trial {frontier.knee.number}")


def _frontier(trials: Any) -> Any:
    from ray_abliterate.search.frontier import Frontier

    return Frontier.of(trials)


def _bound_warnings(directory: Any, frontier: Any) -> list[str]:
    from ray_abliterate.search.bound_warnings import bound_warnings
    from ray_abliterate.search.plan import ModelShape
    from ray_abliterate.search.space import SearchSpace

    facts = directory.read_environment().get("model")
    if facts is None:
        return []
    shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
    recipe = directory.read_recipe()
    return bound_warnings(frontier, SearchSpace.of(shape, recipe.search.space, recipe.edit.norm))


@app.command()
def show(
    run: RunFolder,
    trial: Annotated[int | None, typer.Option(help="One trial's plan and scores.")] = None,
    responses: Annotated[
        bool, typer.Option("--responses", help="The trial's answers, if they were recorded.")
    ] = False,
) -> None:
    """Show the frontier, or one trial."""
    from ray_abliterate.cli.progress_display import (
        console,
        count_trials,
        foreign_table,
        frontier_table,
        layers_table,
        suites_table,
    )
    from ray_abliterate.cli.show import print_responses, print_trial
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.prompt_filter import left_out_lines

    directory = RunDirectory.open(run)
    output = console()
    if trial is None:
        trials = directory.trials()
        baseline = directory.baseline()
        output.print(count_trials(trials, directory.read_recipe().search.trials))
        for line in left_out_lines(directory.read_environment()):
            output.print(line, markup=False)
        output.print(frontier_table(_frontier(trials), baseline.scorecard if baseline else None))
        if selection := directory.selection():
            output.print(layers_table(selection))
        if imported := directory.foreign():
            output.print(foreign_table(imported))
        kept = directory.suite_results(directory.read_recipe().suites)
        if kept.labels:
            output.print(suites_table(kept, build_suites(directory.read_recipe().suites, directory.read_base())))
        for warning in _bound_warnings(directory, _frontier(trials)):
            output.print(f"warning: {warning}", markup=False)
    elif responses:
        print_responses(directory, trial, output)
    else:
        print_trial(directory, directory.trial(trial), output)


app.command()(directions)
app.command()(residuals)
app.command()(evaluate)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html into the run directory."""
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.report.report import write_report

    typer.echo(write_report(RunDirectory.open(run)))


app.command()(export)
app.command()(reproduce)
app.command()(push)
app.command()(import_heretic)


app.command()(chat)
app.command()(serve)


@app.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a refusal-judge.")],
    labelled: Annotated[
        Path, typer.Argument(help="JSONL file: `text`, `label` (refusal or answer), and `prompt`.")
    ],
    scorer: Annotated[str | None, typer.Option(help="Name of the scorer, if several.")] = None,
) -> None:
    """Show how well a refusal-judge tells refusals, and which threshold is best."""
    from ray_abliterate.evaluation.judges import calibration
    from ray_abliterate.evaluation.judges.build import build_judge
    from ray_abliterate.evaluation.scorers.keyword_rate import MARKERS
    from ray_abliterate.evaluation.scorers.markers import Markers
    from ray_abliterate.recipe import RefusalJudge

    judges = [s for s in Recipe.load(recipe).scorers if isinstance(s, RefusalJudge)]
    chosen = [s for s in judges if scorer in (None, s.name)]
    if len(chosen) != 1:
        names = ", ".join(s.name for s in judges) or "none"
        raise RecipeError(
            f"{recipe} has these scorers of kind refusal-judge: {names}.\n"
            "  Add one, or choose one with --scorer NAME."
        )
    with_prompts = chosen[0].endpoint is not None or chosen[0].sees_prompt
    texts = list(calibration.read_labelled_texts(labelled, with_prompts))
    markers = {name: Markers(phrases, name).occur_in for name, phrases in MARKERS.items()}
    for line in calibration.calibrate(build_judge(chosen[0]), texts, markers).lines():
        typer.echo(line)


def main() -> None:
    """Run a verb; a user's error is one message and exit code 2, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except RayAbliterateError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
