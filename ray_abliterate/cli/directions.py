"""The verbs `directions` and `residuals`, which show what a run would edit, without a search."""

from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import Overrides, RunFolder, TrialNumber, open_run
from ray_abliterate.cli.terminal import console, log_to
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import Recipe

commands = typer.Typer()


@commands.command()
def directions(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or a run directory.")
    ],
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to compare; may be given several times.", show_default="all methods"
        ),
    ] = None,
    pairs: Annotated[
        int,
        typer.Option(min=2, help="Pairs of disjoint samples of the prompts, which show stability."),
    ] = 8,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="the run, or runs/RECIPE-directions"),
    ] = None,
) -> None:
    """Compare direction methods without a search: a table, and directions.html."""
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.cli.tables import layers_table, methods_tables
    from ray_abliterate.pipeline.prompt_filter import left_out_lines
    from ray_abliterate.pipeline.residual_analysis import compare_run, methods_to_compare
    from ray_abliterate.report.directions_page import directions_page
    from ray_abliterate.report.pages import write_directions

    output = console()
    with open_display(output) as progress:
        if source.is_dir():
            if overrides:
                raise RecipeError(
                    f"{overrides[0]} changes a recipe, and {source} is a run directory; "
                    "leave it out"
                )
            directory = open_run(source)
            methods = methods_to_compare(directory.read_recipe().direction, method or ())
        else:
            settings = Recipe.load(source, tuple(overrides or ()))
            methods = methods_to_compare(settings.direction, method or ())
            from ray_abliterate.pipeline.extraction import extract

            to = to or Path("runs") / f"{source.stem}-directions"
            text = source.read_text(encoding="utf-8")
            directory = extract(settings, text, source.parent, to, progress)
        log_to(directory.log)
        comparison = compare_run(directory, methods, pairs, progress)
    selection = directory.selection()
    page = directions_page(comparison, directory.read_recipe().model.name, selection)
    written = write_directions(comparison, page, to or directory.path, selection)
    for line in left_out_lines(directory.read_environment()):
        output.print(line, markup=False)
    for table in methods_tables(comparison):
        output.print(table, "")
    if selection is not None:
        output.print(layers_table(selection), "")
    for name, reason in comparison.failed.items():
        output.print(f"{name} has no direction here: {reason}", markup=False)
    output.print(f"Take {comparison.advice.method}.", *comparison.advice.reasons, markup=False)
    output.print(f"Page with all figures: {written}", markup=False)
    if not directory.trials():
        output.print(f"See the residuals:  ray-abliterate residuals {directory.path}", markup=False)


@commands.command()
def residuals(
    run: RunFolder,
    trial: TrialNumber = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="the run")
    ] = None,
) -> None:
    """Show both prompt sets layer by layer: projections, histograms, geometry, as one page."""
    directory, output = open_run(run), console()
    chosen = directory.trial(trial) if trial is not None else None
    from ray_abliterate.cli.progress_display import open_display
    from ray_abliterate.pipeline.residual_analysis import analyse_residuals
    from ray_abliterate.report.pages import write_residuals
    from ray_abliterate.report.residuals_page import residuals_page

    log_to(directory.log)
    with open_display(output) as progress:
        analysis = analyse_residuals(directory, chosen, progress)
    recipe = directory.read_recipe()
    page = residuals_page(analysis, recipe.model.name, recipe.direction.method)
    written = write_residuals(analysis, page, to or directory.path)
    measured = analysis.views[analysis.best].measures
    output.print(
        f"Layer {analysis.best} separates the sets best: AUROC {measured['auroc']:.3f}, overlap "
        f"{measured['overlap']:.0%} on held-out prompts.",
        markup=False,
    )
    output.print(f"Page with all layers: {written}", markup=False)
