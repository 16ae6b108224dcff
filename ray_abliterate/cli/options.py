"""Arguments that several verbs take, and what they stand for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_abliterate.cli.terminal import say

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.search.frontier import Trial

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
RunOrExport = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, or an exported folder.")
]
TrialNumber = Annotated[
    int | None,
    typer.Option("--trial", help="Number of the trial.", show_default="the frontier's knee"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as search.trials=50."),
]


def open_run(path: Path) -> "RunDirectory":
    """Open a run directory before anything heavy is imported.

    Raises:
        RunNotFound: the folder does not hold a run.
    """
    from ray_abliterate.pipeline.directory import RunDirectory

    return RunDirectory.open(path)


def choose_trial(directory: "RunDirectory", number: int | None) -> "Trial":
    """Return the trial that was asked for; without a number the frontier's knee, which is said.

    Raises:
        TrialNotFound: the run has no such trial, or none to choose from.
    """
    from ray_abliterate.errors import TrialNotFound
    from ray_abliterate.search.frontier import Frontier

    if number is not None:
        return directory.trial(number)
    frontier = Frontier.of(directory.trials())
    if not frontier:
        raise TrialNotFound(f"{directory.path} has no finished trial to choose from")
    say(f"--trial is unset: taking trial {frontier.knee.number}, the frontier's knee", err=True)
    return frontier.knee
