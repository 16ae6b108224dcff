"""The command line: verbs to calls. Heavy modules are imported where they are used."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_abliterate.cli_evaluate import evaluate
from ray_abliterate.errors import ChatError, RayAbliterateError, RecipeError, ServeError
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

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
TrialNumber = Annotated[
    int | None, typer.Option("--trial", help="Number of the trial; the frontier's knee if unset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings to change, as search.trials=50."),
]


def configs() -> Path:
    """The recipes that ship: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.exists() else Path(__file__).parent.parent / "configs"


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
    from ray_abliterate.doctor import examine
    from ray_abliterate.live import console

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
    from ray_abliterate.rundir import RunDirectory

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
    from ray_abliterate.rundir import RunDirectory

    directory = RunDirectory.open(run)
    if recipe is not None:
        directory.refuse_changed(Recipe.load(recipe))
    if trials is not None:
        directory.extend(_wanted(trials, len(directory.trials()), directory.recipe.search.trials))
    settings = directory.recipe
    if len(directory.trials()) >= settings.search.trials:
        typer.echo(f"{run} has all of its {settings.search.trials} trials; add some: --trials +50")
    _go(settings, directory, directory.base)


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
    from ray_abliterate.live import (
        console,
        count_trials,
        frontier_table,
        watching,
    )
    from ray_abliterate.report import write_report
    from ray_abliterate.run import run as run_recipe

    output = console()
    interrupted = False
    with watching(output) as watch:
        try:
            run_recipe(settings, directory, base, watch, profile)
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
    from ray_abliterate.frontier import Frontier

    return Frontier.of(trials)


def _bound_warnings(directory: Any, frontier: Any) -> list[str]:
    from ray_abliterate.plan import ModelShape, Space
    from ray_abliterate.saturation import bound_warnings

    facts = directory.environment.get("model")
    if facts is None:
        return []
    shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
    recipe = directory.recipe
    return bound_warnings(frontier, Space.of(shape, recipe.search.space, recipe.edit.norm))


@app.command()
def show(
    run: RunFolder,
    trial: Annotated[int | None, typer.Option(help="One trial's plan and scores.")] = None,
    responses: Annotated[
        bool, typer.Option("--responses", help="The trial's answers, if they were recorded.")
    ] = False,
) -> None:
    """Show the frontier, or one trial."""
    from ray_abliterate.live import (
        console,
        count_trials,
        foreign_table,
        frontier_table,
        suites_table,
    )
    from ray_abliterate.rundir import RunDirectory
    from ray_abliterate.show import print_responses, print_trial
    from ray_abliterate.suites import build

    directory = RunDirectory.open(run)
    output = console()
    if trial is None:
        trials = directory.trials()
        baseline = directory.baseline()
        output.print(count_trials(trials, directory.recipe.search.trials))
        output.print(frontier_table(_frontier(trials), baseline.scorecard if baseline else None))
        if imported := directory.foreign():
            output.print(foreign_table(imported))
        kept = directory.measurements(directory.recipe.suites)
        if kept.labels:
            output.print(suites_table(kept, build(directory.recipe.suites, directory.base)))
        for warning in _bound_warnings(directory, _frontier(trials)):
            output.print(f"warning: {warning}", markup=False)
    elif responses:
        print_responses(directory, trial, output)
    else:
        print_trial(directory, directory.trial(trial), output)


app.command()(evaluate)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html into the run directory."""
    from ray_abliterate.report import write_report
    from ray_abliterate.rundir import RunDirectory

    typer.echo(write_report(RunDirectory.open(run)))


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    trial: TrialNumber = None,
    verify: Annotated[bool, typer.Option(help="Reload, and score it again.")] = True,
) -> None:
    """Write the edited model as a folder of safetensors, and verify it."""
    from ray_abliterate.export import export_trial
    from ray_abliterate.live import LineWatch, console
    from ray_abliterate.rundir import RunDirectory

    directory = RunDirectory.open(run)
    export_trial(directory, _chosen(directory, trial), to, LineWatch(console()), verify)


@app.command()
def reproduce(
    file: Annotated[Path, typer.Argument(help="reproduce.json, or an export that has it.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model; the file's if unset.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")
    ] = False,
) -> None:
    """Rebuild an export from its base model, without a search, and check every tensor."""
    from ray_abliterate.live import LineWatch, console
    from ray_abliterate.reproduce import reproduce as rebuild

    found = rebuild(file, to, LineWatch(console()), base, trust_remote_code)
    equal = f"{found.bit_equal} of {found.tensors} edited tensors are equal bit for bit"
    rest = "" if found.bit_equal == found.tensors else "; the others, within rounding"
    typer.echo(f"{equal}{rest}. Written to {to}")


@app.command()
def push(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or an exported folder.")],
    to: Annotated[str, typer.Option(help="USER/NAME of the model on the Hugging Face Hub.")],
    trial: TrialNumber = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also if it was not scored again.")
    ] = False,
    with_responses: Annotated[
        bool, typer.Option("--with-responses", help="Also files with prompts or answers.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face Hub, private unless told."""
    from ray_abliterate.live import LineWatch, console
    from ray_abliterate.push import exported
    from ray_abliterate.push import push as upload

    watch = LineWatch(console())
    folder = exported(place, trial, watch, unverified)
    revision = upload(folder, to, watch, public, unverified, with_responses)
    typer.echo(f"{to} is there, revision {revision}")


@app.command()
def import_heretic(
    checkpoint: Annotated[Path, typer.Argument(help="Heretic's checkpoints/MODEL.jsonl.")],
    to: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/CHECKPOINT")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is, if not where the checkpoint says.")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Take over its Pareto front only.")
    ] = False,
) -> None:
    """Make a run of a Heretic study: its trials are plans that are evaluated first."""
    from ray_abliterate.import_heretic import import_heretic as take_over
    from ray_abliterate.live import LineWatch, console, foreign_table

    output = console()
    folder = to or Path("runs") / checkpoint.stem
    made = take_over(checkpoint, folder, LineWatch(output), model, front)
    output.print(foreign_table(made.directory.foreign() or {}, rows=20))
    for note in made.notes:
        output.print(f"note: {note}", markup=False)
    if made.study.unfinished:
        output.print(f"{made.study.unfinished} trials of the study did not finish; left out")
    output.print(f"{len(made.trials)} plans wait in {folder}. Score them here, in parallel, with:")
    output.print(f"  ray-abliterate resume {folder}", markup=False)


@app.command()
def chat(
    run: RunFolder,
    trial: TrialNumber = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    compare: Annotated[
        bool, typer.Option("--compare", help="Original and edited model, side by side.")
    ] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Both, as A and B in an order drawn at random.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write what was said, as JSON Lines.", show_default=False)
    ] = None,
) -> None:
    """Talk to the edited model: alone, beside the original, or blind. Lines may come by pipe."""
    if compare and blind:
        raise ChatError("--compare names the models, --blind hides them: choose one of the two")
    from ray_abliterate.chat import Options, converse
    from ray_abliterate.live import console
    from ray_abliterate.rundir import RunDirectory

    directory = RunDirectory.open(run)
    options = Options("blind" if blind else "compare" if compare else "one", tokens, save)
    converse(directory, _chosen(directory, trial), options, console(), sys.stdin)


@app.command()
def serve(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or an exported folder.")],
    trial: TrialNumber = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address it listens at; any but a loopback one opens it to others.")
    ] = "127.0.0.1",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Answer OpenAI-compatible requests with an edited model, by transformers' own server."""
    from ray_abliterate.live import LineWatch, console
    from ray_abliterate.serve import exported, is_export, of_trial, refuse_early, start

    if is_export(place) and trial is not None:
        raise ServeError(f"--trial {trial}: {place} is an export, not a run; leave it out")
    watch = LineWatch(console())
    refuse_early(host, port, watch)
    if is_export(place):
        served = exported(place, trust_remote_code)
    else:
        from ray_abliterate.rundir import RunDirectory

        directory = RunDirectory.open(place)
        served = of_trial(directory, _chosen(directory, trial), watch, trust_remote_code)
    start(served, host, port, watch)


@app.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a refusal-judge.")],
    labelled: Annotated[
        Path, typer.Argument(help="JSONL file: `text`, `label` (refusal or answer), and `prompt`.")
    ],
    scorer: Annotated[str | None, typer.Option(help="Name of the scorer, if several.")] = None,
) -> None:
    """Show how well a refusal-judge tells refusals, and which threshold is best."""
    from ray_abliterate.judges import build, calibration
    from ray_abliterate.recipe import RefusalJudge
    from ray_abliterate.scorers.keyword_rate import MARKERS

    judges = [s for s in Recipe.load(recipe).scorers if isinstance(s, RefusalJudge)]
    chosen = [s for s in judges if scorer in (None, s.name)]
    if len(chosen) != 1:
        names = ", ".join(s.name for s in judges) or "none"
        raise RecipeError(
            f"{recipe} has these scorers of kind refusal-judge: {names}.\n"
            "  Add one, or choose one with --scorer NAME."
        )
    with_prompts = chosen[0].endpoint is not None or chosen[0].sees_prompt
    texts = list(calibration.labelled(labelled, with_prompts))
    for line in calibration.calibrate(build(chosen[0]), texts, dict(MARKERS)).lines():
        typer.echo(line)


def _chosen(directory: Any, number: int | None) -> Any:
    """The trial asked for, or the knee, which is said."""
    from ray_abliterate.errors import TrialNotFound

    if number is not None:
        return directory.trial(number)
    frontier = _frontier(directory.trials())
    if not frontier:
        raise TrialNotFound(f"{directory.path} has no finished trial to choose from")
    number = frontier.knee.number
    typer.echo(f"no --trial given: taking trial {number}, the frontier's knee", err=True)
    return frontier.knee


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
