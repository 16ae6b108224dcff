"""The verbs `directions` and `residuals`: looking at what a run would edit, without a search."""

from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import Overrides, RunFolder, TrialNumber
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import Recipe


def directions(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or a run directory.")
    ],
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to compare; all if unset. May come often.")
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=2, help="Pairs of samples of the prompts, for stability.")
    ] = 8,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="the run, or runs/RECIPE-directions"),
    ] = None,
) -> None:
    """Compare direction methods without a search: a table, and directions.html."""
    from ray_abliterate.cli.progress_display import watching
    from ray_abliterate.cli.tables import layers_table, methods_tables
    from ray_abliterate.cli.terminal import console
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.prompt_filter import left_out_lines
    from ray_abliterate.pipeline.residual_analysis import compare_run, methods_of
    from ray_abliterate.report.directions_page import comparison_page
    from ray_abliterate.report.pages import write_comparison

    output = console()
    with watching(output) as progress:
        if source.is_dir():
            if overrides:
                raise RecipeError(f"{overrides[0]} changes a recipe, and {source} is a folder")
            directory = RunDirectory.open(source)
            methods = methods_of(directory.read_recipe().direction, method or ())
        else:
            settings = Recipe.load(source, tuple(overrides or ()))
            methods = methods_of(settings.direction, method or ())
            from ray_abliterate.pipeline.extraction import extract

            to = to or Path("runs") / f"{source.stem}-directions"
            text = source.read_text(encoding="utf-8")
            directory = extract(settings, text, source.parent, to, progress)
        found = compare_run(directory, methods, pairs, progress)
    selection = directory.selection()
    page = comparison_page(found, directory.read_recipe().model.name, selection)
    written = write_comparison(found, page, to or directory.path, selection)
    for line in left_out_lines(directory.read_environment()):
        output.print(line, markup=False)
    for table in methods_tables(found):
        output.print(table, "")
    if selection is not None:
        output.print(layers_table(selection), "")
    for name, why in found.failed.items():
        output.print(f"{name} has no direction here: {why}", markup=False)
    output.print(f"Take {found.advice.method}.", *found.advice.reasons, markup=False)
    output.print(f"All of it: {written}", markup=False)
    if not directory.trials():
        output.print(f"See the residuals:  ray-abliterate residuals {directory.path}", markup=False)


def residuals(
    run: RunFolder,
    trial: TrialNumber = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write; the run's if unset.")] = None,
) -> None:
    """Show both prompt sets layer by layer: projections, histograms, geometry, as one page."""
    from ray_abliterate.cli.progress_display import watching
    from ray_abliterate.cli.terminal import console
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.residual_analysis import look
    from ray_abliterate.report.pages import write_look
    from ray_abliterate.report.residuals_page import residuals_page

    directory, output = RunDirectory.open(run), console()
    chosen = directory.trial(trial) if trial is not None else None
    with watching(output) as progress:
        found = look(directory, chosen, progress)
    recipe = directory.read_recipe()
    page = residuals_page(
        found.views, recipe.model.name, recipe.direction.method, found.best, found.strengths,
        found.trial,
    )  # fmt: skip
    measured = found.views[found.best].measures
    output.print(
        f"Layer {found.best} tells the sets apart best: AUROC {measured['auroc']:.3f}, overlap "
        f"{measured['overlap']:.0%} on held-out prompts.",
        markup=False,
    )
    output.print(f"All layers: {write_look(found, page, to or directory.path)}", markup=False)
