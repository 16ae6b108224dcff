"""The verbs that try an edited model out: `chat` and `serve`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import RunFolder, RunOrExport, TrialNumber, choose_trial, open_run
from ray_abliterate.cli.terminal import console, log_to, release_terminal
from ray_abliterate.errors import ChatError, ServeError

commands = typer.Typer()


@commands.command()
def chat(
    run: RunFolder,
    trial: TrialNumber = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Let the original and the edited model answer, side by side."
        ),
    ] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Let both answer, as A and B in a random order.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the conversation to this file, as JSON Lines.", show_default=False
        ),
    ] = None,
) -> None:
    """Talk to the edited model: alone, compared with the original, or blind.

    Questions may also come through a pipe, a line each.
    """
    if compare and blind:
        raise ChatError("--compare names the models, --blind hides them: choose one of the two")
    directory = open_run(run)
    chosen = choose_trial(directory, trial)
    log_to(directory.log)
    from ray_abliterate.cli.chat import ChatOptions, converse

    options = ChatOptions("blind" if blind else "compare" if compare else "one", tokens, save)
    converse(directory, chosen, options, console(), sys.stdin)


@commands.command()
def serve(
    place: RunOrExport,
    trial: TrialNumber = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; any but a loopback address is open to other machines."
        ),
    ] = "127.0.0.1",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Serve an edited model to OpenAI-compatible clients, with transformers' own server."""
    from ray_abliterate.cli.progress_display import LineDisplay
    from ray_abliterate.export.find_export import is_export
    from ray_abliterate.export.serve import (
        refuse_unservable,
        serve_folder,
        serve_trial,
        start_server,
    )

    if is_export(place) and trial is not None:
        raise ServeError(f"--trial {trial}: {place} is an export, not a run; leave it out")
    progress = LineDisplay(console())
    refuse_unservable(host, port, progress)
    if is_export(place):
        served = serve_folder(place, trust_remote_code)
    else:
        directory = open_run(place)
        log_to(directory.log)
        served = serve_trial(directory, choose_trial(directory, trial), progress, trust_remote_code)
    release_terminal()  # the server takes this process over
    start_server(served, host, port, progress)
