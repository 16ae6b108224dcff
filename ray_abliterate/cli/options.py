"""Arguments that several verbs take."""

from pathlib import Path
from typing import Annotated, Any

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
TrialNumber = Annotated[
    int | None, typer.Option("--trial", help="Number of the trial; the frontier's knee if unset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings to change, as search.trials=50."),
]


def chosen_trial(directory: Any, number: int | None) -> Any:
    """The trial asked for, or the knee, which is said."""
    from ray_abliterate.errors import TrialNotFound
    from ray_abliterate.search.frontier import Frontier

    if number is not None:
        return directory.trial(number)
    frontier = Frontier.of(directory.trials())
    if not frontier:
        raise TrialNotFound(f"{directory.path} has no finished trial to choose from")
    number = frontier.knee.number
    typer.echo(f"no --trial given: taking trial {number}, the frontier's knee", err=True)
    return frontier.knee
