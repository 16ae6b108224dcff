"""The verb `evaluate`: suites or one long text, on a run's trials or on any model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_abliterate.cli.options import open_run
from ray_abliterate.cli.terminal import console, log_to
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import SuiteFile, SuiteSettings
from ray_abliterate.recipe.suites import OverRefusalSuite, PerplexitySuite

if TYPE_CHECKING:
    from ray_abliterate.evaluation.streaming.reader import TextRequest
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.evaluate import Models
    from ray_abliterate.pipeline.text_evaluation import TextResults

commands = typer.Typer()

SUITES_WITHOUT_A_RUN: tuple[SuiteSettings, ...] = (
    OverRefusalSuite(kind="over-refusal"),
    PerplexitySuite(kind="perplexity"),
)
"""What a model outside any run is measured with, if no suites are given: they need no files."""


@commands.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="A run directory, a model's folder, or a Hub name."
        ),
    ],
    trial: Annotated[
        list[int] | None,
        typer.Option(help="Trial of the run; may be given often.", show_default="the frontier"),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Another model to compare MODEL with.")
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Suite to run; may be given often.", show_default="all"),
    ] = None,
    suites: Annotated[
        Path | None,
        typer.Option(help="TOML file with [[suites]].", show_default="the recipe's own"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Read this long text instead: a file (.txt, .npy, .parquet, …) or hub:NAME."
        ),
    ] = None,
    carry: Annotated[
        str | None,
        typer.Option(
            help="What a chunk of the text hands to the next: kv, state, window or none.",
            show_default="the most exact that fits",
        ),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Tokens of context before a chunk, with --carry none.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of the window, with --carry window.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text to read.", show_default="all")
    ] = None,
    states: Annotated[
        float,
        typer.Option(help="GB of disk for states of the base model that trials start from."),
    ] = 1.0,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results of a model, or of a text.", show_default="see below"
        ),
    ] = None,
) -> None:
    """Measure suites, or the loss along one long text, on a run's trials or on any model.

    Results of a run go into its folder, those of a model into ./evaluation.
    """
    from ray_abliterate.pipeline.directory import RunDirectory

    is_run = RunDirectory.holds_run(Path(model))
    if trial and not is_run:
        raise RecipeError(f"--trial {trial[0]}: {model} is not a run directory")
    if compare and is_run:
        raise RecipeError(
            f"--compare {compare}: a run's trials are compared with its base model.\n"
            "  To compare a trial with another model, export it and evaluate the folder."
        )
    if text is not None:
        from ray_abliterate.evaluation.streaming.reader import TextRequest

        request = TextRequest(text, carry, chunk, overlap, window, tokens, states)
        if is_run:
            _read_text_with_run(open_run(Path(model)), trial or [], request, to)
        else:
            _read_text_with_models(model, compare, request, to)
    elif is_run:
        if to is not None:
            raise RecipeError(f"--to {to}: results of a run are saved in the run directory")
        _measure_run(open_run(Path(model)), trial or [], suite or [], suites)
    else:
        _measure_models((model, compare), suite or [], suites, to)


def _measure_run(
    directory: "RunDirectory", numbers: list[int], names: list[str], file: Path | None
) -> None:
    """Measure suites on trials of a run, or on its frontier if no numbers are given."""
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.cli.tables import suites_table
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.evaluate import evaluate_run, save_suite_scores
    from ray_abliterate.pipeline.suite_runner import chosen_suites
    from ray_abliterate.search.frontier import Frontier

    settings = SuiteFile.load(file) if file else directory.read_recipe().suites
    base = file.parent if file else directory.read_base()
    chosen = chosen_suites(settings, names)
    suites = build_suites(chosen, base)
    trials = [directory.trial(number) for number in numbers]
    trials = trials or list(Frontier.of(directory.trials()).members)
    log_to(directory.log)
    with open_display(console()) as progress:
        evaluate_run(directory, trials, chosen, base, progress)
    results = directory.suite_results(chosen)
    console().print(suites_table(results, suites))
    saved = save_suite_scores(results, suites, directory.path / "evaluations")
    console().print(f"Saved in {saved.parent}")


def _measure_models(
    models: tuple[str, str | None], names: list[str], file: Path | None, to: Path | None
) -> None:
    """Measure suites on a model, and on another one to compare it with."""
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.cli.tables import suites_table
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.evaluate import Models, evaluate_models, save_suite_scores
    from ray_abliterate.pipeline.suite_runner import chosen_suites

    chosen = chosen_suites(SuiteFile.load(file) if file else SUITES_WITHOUT_A_RUN, names)
    base, folder = file.parent if file else Path(), to or Path("evaluation")
    compared, suites = Models(*models), build_suites(chosen, base)
    with open_display(console()) as progress:
        results = evaluate_models(compared, chosen, base, folder, progress)
    console().print(suites_table(results, suites))
    _print_labels(compared)
    console().print(f"Saved in {save_suite_scores(results, suites, folder).parent}")


def _read_text_with_run(
    directory: "RunDirectory", numbers: list[int], request: "TextRequest", to: Path | None
) -> None:
    """Read a text with a run's base model and its trials, or its knee if no numbers are given."""
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.pipeline.evaluate import read_with_run
    from ray_abliterate.search.frontier import Frontier

    trials = [directory.trial(number) for number in numbers]
    trials = trials or [Frontier.of(directory.trials()).knee]
    folder = to or directory.path / "evaluations" / "text"
    log_to(directory.log)
    with open_display(console()) as progress:
        text = read_with_run(directory, trials, request, folder, progress)
    _show_text(text, folder)


def _read_text_with_models(
    name: str, compare: str | None, request: "TextRequest", to: Path | None
) -> None:
    """Read a text with a model, and with another one to compare it with."""
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.pipeline.evaluate import Models, read_with_models

    models, folder = Models(name, compare), to or Path("evaluation")
    with open_display(console()) as progress:
        text = read_with_models(models, request, folder, progress)
    _show_text(text, folder, models)


def _show_text(text: "TextResults", folder: Path, models: "Models | None" = None) -> None:
    """Write the page of a text, and print its table."""
    from ray_abliterate.cli.tables import text_table
    from ray_abliterate.report.pages import write_text_page

    write_text_page(text, folder)
    console().print(text_table(text))
    if models:
        _print_labels(models)
    console().print(f"Chunks, totals and a plot (chunks.html): {folder}")


def _print_labels(models: "Models") -> None:
    """Say which model each label in the table stands for, if there are two."""
    if models.other is not None:
        for label, name in models.labelled():
            console().print(f"{label}: {name}", markup=False)
