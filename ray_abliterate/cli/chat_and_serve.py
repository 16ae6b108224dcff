"""The verbs `chat` and `serve`: trying an edited model out."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import RunFolder, TrialNumber, chosen_trial
from ray_abliterate.errors import ChatError, ServeError


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
    from ray_abliterate.cli.chat import Options, converse
    from ray_abliterate.cli.progress_display import console
    from ray_abliterate.pipeline.directory import RunDirectory

    directory = RunDirectory.open(run)
    options = Options("blind" if blind else "compare" if compare else "one", tokens, save)
    converse(directory, chosen_trial(directory, trial), options, console(), sys.stdin)


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
    from ray_abliterate.cli.progress_display import LineWatch, console
    from ray_abliterate.export.serve import exported, is_export, of_trial, refuse_early, start

    if is_export(place) and trial is not None:
        raise ServeError(f"--trial {trial}: {place} is an export, not a run; leave it out")
    watch = LineWatch(console())
    refuse_early(host, port, watch)
    if is_export(place):
        served = exported(place, trust_remote_code)
    else:
        from ray_abliterate.pipeline.directory import RunDirectory

        directory = RunDirectory.open(place)
        served = of_trial(directory, chosen_trial(directory, trial), watch, trust_remote_code)
    start(served, host, port, watch)
