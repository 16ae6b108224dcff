"""The verbs that read a run without changing it: `show` and `report`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ray_abliterate.cli.options import RunFolder, open_run
from ray_abliterate.cli.run import print_bound_warnings
from ray_abliterate.cli.terminal import console, say

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory

commands = typer.Typer()
pages = typer.Typer()


@commands.command()
def show(
    run: RunFolder,
    trial: Annotated[int | None, typer.Option(help="Show one trial's plan and scores.")] = None,
    responses: Annotated[
        bool, typer.Option("--responses", help="Show the trial's answers, if they were recorded.")
    ] = False,
) -> None:
    """Show the frontier, or one trial."""
    directory = open_run(run)
    from ray_abliterate.cli.trial_view import print_responses, print_trial

    if trial is None:
        _print_run(directory)
    elif responses:
        print_responses(directory, trial, console())
    else:
        print_trial(directory, directory.trial(trial), console())


def _print_run(directory: "RunDirectory") -> None:
    """Print how many trials ended how, the frontier, and what else is known of the run."""
    from ray_abliterate.cli.tables import (
        count_trials,
        foreign_table,
        frontier_table,
        layers_table,
        suites_table,
    )
    from ray_abliterate.evaluation.suites.build import build_suites
    from ray_abliterate.pipeline.prompt_filter import left_out_lines
    from ray_abliterate.search.frontier import Frontier

    output, recipe = console(), directory.read_recipe()
    trials, baseline = directory.trials(), directory.baseline()
    output.print(count_trials(trials, recipe.search.trials))
    for line in left_out_lines(directory.read_environment()):
        output.print(line, markup=False)
    output.print(frontier_table(Frontier.of(trials), baseline.scorecard if baseline else None))
    if selection := directory.selection():
        output.print(layers_table(selection))
    if imported := directory.imported_study():
        output.print(foreign_table(imported))
    results = directory.suite_results(recipe.suites)
    if results.labels:
        output.print(suites_table(results, build_suites(recipe.suites, directory.read_base())))
    print_bound_warnings(directory)


@pages.command()
def report(run: RunFolder) -> None:
    """Write report.html into the run directory."""
    directory = open_run(run)
    from ray_abliterate.report.report import write_report

    say(write_report(directory))
