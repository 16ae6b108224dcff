"""Talk to the original model and to edited ones: to one, to both by name, or to both blind.

    converse(directory, trial, ChatOptions(), console, sys.stdin)

Each line is a question or a command of `HELP`. Each model has a conversation of its own, which it
continues whenever it answers again. Weights are edited in place for each answer, so switching to
another trial takes no time.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console

from ray_abliterate.cli.chat_session import BASE, ChatSession, Mode, Speaker, refuse_existing
from ray_abliterate.cli.chat_view import open_view, print_plain
from ray_abliterate.cli.tables import frontier_table
from ray_abliterate.errors import ChatError, RayAbliterateError, RunDirectoryError
from ray_abliterate.model.source import resolve_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.score_text import describe_score

HELP = """\
/trial N     talk to trial N
/base        talk to the original
/trials      list the frontier
/compare     let both answer, side by side
/blind       let both answer, as A and B in a random order
/a /b /same  vote: which of the last two blind answers is better
/reveal      show who was A, and the votes; both start over
/reset       forget all conversations
/save FILE   write the transcript, as JSON Lines
/help        show this list
/quit        leave, as Ctrl-D does; Ctrl-C ends an answer"""


@dataclass(frozen=True)
class ChatOptions:
    """Settings of a chat.

    Attributes:
        mode: Who answers: one model, both by name, or both as A and B.
        tokens: Longest answer, in tokens.
        save: File that the transcript is written to at the end; none if None.
    """

    mode: Mode = "one"
    tokens: int = 256
    save: Path | None = None


def converse(
    directory: RunDirectory,
    trial: Trial,
    options: ChatOptions,
    output: Console,
    source: TextIO,
    rng: random.Random | None = None,
) -> None:
    """Answer the lines of `source` until it ends.

    Args:
        directory: The run.
        trial: The trial whose plan makes the edited model.
        options: Who answers, how long, and where the transcript goes.
        output: Where answers go.
        source: What the user types. If it is no terminal, only answers are printed, a line each.
        rng: Draws the order of blind answers.

    Raises:
        RunDirectoryError: the run has no directions.
        ChatError: the transcript cannot be written; or a command is wrong, and `source` is no
            terminal at which it could be corrected.
    """
    if options.save is not None:
        refuse_existing(options.save)
    directions = directory.directions()
    if directions is None:
        raise RunDirectoryError(
            f"{directory.path} has no directions yet.\n"
            f"  Compute them with:  ray-abliterate resume {directory.path}"
        )
    prefix = tuple(directory.read_environment()["response_prefix"])
    setup = TrialSetup(directions, prefix, directory.tuning())
    name = directory.read_recipe().model.name
    replica = Replica(
        directory.pin_revision(directory.read_recipe()),
        resolve_model(name, SilentProgress().note),
        {},
    )
    edited, rng = Speaker.of(trial), rng or random.Random()
    session = ChatSession(directory, replica, setup, options.tokens, edited, options.mode, rng)
    session.choose_speakers(options.mode)
    interactive = source.isatty()
    if interactive:
        greet(directory, trial, session, output)
    try:
        while (line := next_line(output, source)) not in (None, "/quit"):
            assert line is not None
            if line.startswith("/"):
                _command(session, line, output, interactive)
            elif line:
                session.ask(line, open_view(output, interactive, len(session.speakers)))
    finally:
        if options.save is not None:
            message = session.save(options.save)
            _say(output, message if interactive else "")
    if interactive and session.votes:
        _say(output, "\n".join(session.tally()))


def greet(directory: RunDirectory, trial: Trial, session: ChatSession, output: Console) -> None:
    """Print who answers, how the trial scored, and the commands."""
    _say(output, f"{directory.read_recipe().model.name}: {session.speakers_text}")
    baseline = directory.baseline()
    for score in trial.scorecard.scores if trial.scorecard else ():
        base = f" (original: {describe_score(baseline.scorecard[score.name])})" if baseline else ""
        _say(output, f"  {score.name}: {describe_score(score)}{base}")
    _say(output, HELP)


def next_line(output: Console, source: TextIO) -> str | None:
    """Return the next line without surrounding blanks; None at the end of input, or at Ctrl-C."""
    try:
        if source.isatty():
            output.print("\n> ", end="", style="bold")
        line = source.readline()
    except KeyboardInterrupt:
        return None
    if not line and source.isatty():
        output.print()
    return line.strip() if line else None


def _command(session: ChatSession, line: str, output: Console, interactive: bool) -> None:
    """Carry a command out. A wrong one is reported; where nobody types, it ends the chat."""
    try:
        message = _carry_out(session, line, output, interactive)
    except RayAbliterateError as error:
        if not interactive:
            raise
        message = str(error)
    if interactive:
        _say(output, message)


def _carry_out(session: ChatSession, line: str, output: Console, interactive: bool) -> str:
    """Carry a command out, and return what to say about it.

    Raises:
        RayAbliterateError: it is unknown, or cannot be carried out.
    """
    word, _, rest = line.partition(" ")
    with_argument = {"/trial", "/save"}
    if word in COMMANDS and bool(rest) == (word in with_argument):
        return COMMANDS[word](session, rest.strip())
    if word == "/trials" and not rest:
        if interactive:
            _list_trials(session, output)
        return "Talk to one with /trial N."
    raise ChatError(f"{line} is not a command.\n{HELP}")


def _list_trials(session: ChatSession, output: Console) -> None:
    baseline = session.directory.baseline()
    frontier = Frontier.of(session.directory.trials())
    output.print(frontier_table(frontier, baseline.scorecard if baseline else None))


def _trial(session: ChatSession, rest: str) -> str:
    if not rest.isdecimal():
        raise ChatError(f"/trial {rest}: {rest!r} is not the number of a trial; /trials lists some")
    session.edited = Speaker.of(session.directory.trial(int(rest)))
    session.choose_speakers(session.mode)
    return f"Now talking to {session.speakers_text}."


def _base(session: ChatSession, _: str) -> str:
    session.choose_speakers("one", BASE)
    return f"Now talking to {session.speakers_text}."


def _compare(session: ChatSession, _: str) -> str:
    session.choose_speakers("compare")
    return f"Now talking to {session.speakers_text}."


def _blind(session: ChatSession, _: str) -> str:
    session.choose_speakers("blind")
    return f"Now talking to {session.speakers_text}."


def _reset(session: ChatSession, _: str) -> str:
    session.conversations.clear()
    session.choose_speakers(session.mode, session.speakers[0])
    return "All conversations start over."


COMMANDS: dict[str, Callable[[ChatSession, str], str]] = {
    "/trial": _trial,
    "/base": _base,
    "/compare": _compare,
    "/blind": _blind,
    "/a": lambda session, _: session.vote(0),
    "/b": lambda session, _: session.vote(1),
    "/same": lambda session, _: session.vote(None),
    "/reveal": lambda session, _: session.reveal(),
    "/reset": _reset,
    "/save": lambda session, rest: session.save(Path(rest).expanduser()),
    "/help": lambda _session, _rest: HELP,
}


def _say(output: Console, text: str) -> None:
    if text:
        print_plain(output, f"{text}\n")
