"""The command line: assembles the verbs, and runs one of them.

Verbs import heavy modules where they use them, so that `--help` is instant.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ray_abliterate.cli import (
    chat_and_serve,
    directions,
    evaluate,
    export,
    recipe,
    run,
    show,
)
from ray_abliterate.cli.terminal import Terminal, say
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.model.optional_packages import hide_optional_packages

VERBOSE = ("-v", "--verbose")

app = typer.Typer(
    name="ray-abliterate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def quiet_libraries(
    context: typer.Context,
    verbose: Annotated[
        bool,
        typer.Option(
            *VERBOSE, help="Show what libraries print, too; may also stand after the command."
        ),
    ] = False,
) -> None:
    """Find the direction of a behaviour in a language model, and the weight edit that removes it
    and little else.
    """
    terminal = context.find_object(Terminal)
    if terminal is None:  # called by a program that minds the terminal itself
        return
    context.call_on_close(terminal.restore)
    if verbose or sys.stdout is None or sys.stderr is None:
        terminal.show_all()
    else:
        terminal.quiet()


for verbs in (
    recipe.commands,
    run.commands,
    show.commands,
    directions.commands,
    evaluate.commands,
    show.pages,
    export.commands,
    chat_and_serve.commands,
    recipe.judges,
):
    app.add_typer(verbs)


def main() -> None:
    """Run the command line as a process of its own."""
    hide_optional_packages()
    terminal = Terminal(sys.argv[1:])
    try:
        run_command(sys.argv[1:], terminal)
    finally:
        terminal.silence_exit()


def run_command(arguments: Sequence[str], terminal: Terminal | None = None) -> None:
    """Run a verb, and exit with its code.

    Args:
        arguments: The verb with its arguments and options.
        terminal: Silences libraries; a new one if None.

    An error that a user can act on is a message and exit code 2. Any other error is a line that
    names the log with the traceback, and exit code 1.
    """
    words = [argument for argument in arguments if argument not in VERBOSE]
    if len(words) < len(arguments):  # typer knows the option before the verb only
        arguments = [VERBOSE[0], *words]
    terminal = terminal or Terminal(arguments)
    try:
        app(args=arguments, obj=terminal, prog_name=app.info.name)
    except RayAbliterateError as error:
        say(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted", err=True)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  reported, with its traceback
        terminal.report_crash(error)
        sys.exit(1)
    finally:
        terminal.close()
