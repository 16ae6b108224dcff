"""The verb `evaluate`: suites or a long text, on a run's models or on any model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import SuiteFile, SuiteSettings
from ray_abliterate.recipe.suites import OverRefusalSuite, PerplexitySuite

NO_NEED_OF_FILES: tuple[SuiteSettings, ...] = (
    OverRefusalSuite(kind="over-refusal"),
    PerplexitySuite(kind="perplexity"),
)
"""Suites of a model of no run, if none are given."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="A run directory, a model's folder, or hub name."
        ),
    ],
    trial: Annotated[
        list[int] | None, typer.Option(help="Trials of a run; its frontier if unset.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Another model to compare MODEL with.")
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Suites to run; all if unset.")] = None,
    suites: Annotated[
        Path | None, typer.Option(help="File with [[suites]]; the recipe's own if unset.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Read one long text instead: a file (.txt, .npy, .parquet, …), hub:NAME."
        ),
    ] = None,
    carry: Annotated[
        str | None, typer.Option(help="kv, state, window or none; the most exact that fits.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a chunk.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Tokens of context, carry = none.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens, carry = window.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text; all if unset.")] = None,
    states: Annotated[
        float, typer.Option(help="GB of disk for what readings by other trials begin with.")
    ] = 1.0,
    to: Annotated[
        Path | None, typer.Option(help="Folder for what is found; of a run's text, or of a model.")
    ] = None,
) -> None:
    """Measure suites, or the perplexity of one long text, on a run's trials or on any model."""
    from ray_abliterate.cli.terminal import console
    from ray_abliterate.pipeline.directory import RunDirectory

    is_run = RunDirectory.is_one(Path(model))
    if trial and not is_run:
        raise RecipeError(f"--trial {trial[0]}: {model} is not a run directory")
    if compare and is_run:
        raise RecipeError(
            f"--compare {compare}: a run's trials are compared with its base model.\n"
            "  To compare a trial with another model, export it and evaluate the folder."
        )
    if text is not None:
        from ray_abliterate.evaluation.streaming.reader import TextRequest
        from ray_abliterate.pipeline.evaluate import Models

        reading = TextRequest(text, carry, chunk, overlap, window, tokens, states)
        models = None if is_run else Models(model, compare)
        _read(model, trial or [], models, reading, to, console())
    elif is_run:
        if to is not None:
            raise RecipeError(f"--to {to}: what is found of a run is kept in the run directory")
        _suites_of_run(model, trial or [], suite or [], suites, console())
    else:
        _suites_of_models(model, compare, suite or [], suites, to, console())


def _suites_of_run(
    name: str, numbers: list[int], names: list[str], file: Path | None, output: Any
) -> None:
    from ray_abliterate.cli.progress_display import watching
    from ray_abliterate.cli.tables import suites_table
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.evaluate import evaluate_run, save_findings
    from ray_abliterate.pipeline.suite_runner import chosen_suites
    from ray_abliterate.search.frontier import Frontier

    directory = RunDirectory.open(Path(name))
    known = SuiteFile.load(file) if file else directory.read_recipe().suites
    chosen, base = chosen_suites(known, names), file.parent if file else directory.read_base()
    built = build_suites(chosen, base)
    members = [directory.trial(number) for number in numbers]
    with watching(output) as progress:
        members = members or list(Frontier.of(directory.trials()).members)
        evaluate_run(directory, members, chosen, base, progress)
    kept = directory.suite_results(chosen)
    output.print(suites_table(kept, built))
    output.print(f"Kept in {save_findings(kept, built, directory.path / 'evaluations').parent}")


def _suites_of_models(
    name: str,
    compare: str | None,
    names: list[str],
    file: Path | None,
    to: Path | None,
    output: Any,
) -> None:
    from ray_abliterate.cli.progress_display import watching
    from ray_abliterate.cli.tables import suites_table
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.evaluate import Models, evaluate_models, save_findings
    from ray_abliterate.pipeline.suite_runner import chosen_suites

    chosen = chosen_suites(SuiteFile.load(file) if file else NO_NEED_OF_FILES, names)
    base, folder = file.parent if file else Path(), to or Path("evaluation")
    models, built = Models(name, compare), build_suites(chosen, base)
    with watching(output) as progress:
        kept = evaluate_models(models, chosen, base, folder, progress)
    output.print(suites_table(kept, built))
    _say_who(models, output)
    output.print(f"Kept in {save_findings(kept, built, folder).parent}")


def _read(
    name: str,
    numbers: list[int],
    models: Any,
    reading: Any,
    to: Path | None,
    output: Any,
) -> None:
    """Read a text with models, or with trials of the run `name` if there are none."""
    from ray_abliterate.cli.progress_display import watching
    from ray_abliterate.cli.tables import text_table
    from ray_abliterate.pipeline.evaluate import read_with_models
    from ray_abliterate.report.pages import write_text_page

    run_folder = Path(name) / "evaluations" / "text"
    folder = to or (Path("evaluation") if models else run_folder)
    with watching(output) as progress:
        if models:
            found = read_with_models(models, reading, folder, progress)
        else:
            found = _read_with_run(name, numbers, reading, folder, progress)
    write_text_page(found, folder)
    output.print(text_table(found))
    if models:
        _say_who(models, output)
    output.print(f"Chunks, totals and a plot (chunks.html): {folder}")


def _read_with_run(name: str, numbers: list[int], reading: Any, folder: Path, progress: Any) -> Any:
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.evaluate import read_with_run
    from ray_abliterate.search.frontier import Frontier

    directory = RunDirectory.open(Path(name))
    trials = [directory.trial(number) for number in numbers]
    trials = trials or [Frontier.of(directory.trials()).knee]
    return read_with_run(directory, trials, reading, folder, progress)


def _say_who(models: Any, output: Any) -> None:
    if models.other is not None:
        for title, name in models.labelled():
            output.print(f"{title}: {name}", markup=False)
