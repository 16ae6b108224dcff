"""A conversation with the original and with edited models: alone, compared, or blind.

    converse(directory, trial, Options(), console, sys.stdin)

Lines are questions, or commands of `HELP`. Each model has a conversation of its own, which it goes
on with whenever it is talked to again; weights are edited in place for each answer, so a trial is
there as soon as it is named.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console

from ray_abliterate.cli.chat_session import BASE, Mode, Session, Speaker, refuse_taken
from ray_abliterate.cli.chat_view import view_for, write
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
/compare     both answer, side by side
/blind       both answer, as A and B, in an order drawn at random
/a /b /same  which of the last two blind answers is better
/reveal      who was A, and the votes; both begin anew
/reset       forget all conversations
/save FILE   write what was said, as JSON Lines
/help        this list
/quit        leave, as Ctrl-D does; Ctrl-C ends an answer"""


@dataclass(frozen=True)
class ChatOptions:
    """How to talk.

    Attributes:
        mode: Who answers: one model, both by name, or both as A and B.
        tokens: Most tokens of an answer.
        save: Where the transcript goes at the end; nowhere if None.
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
    """Answer lines of `source` until it ends.

    Args:
        directory: The run.
        trial: The trial whose plan makes the edited model.
        options: Who answers, how long, and whether it is written down.
        output: Where answers go.
        source: What the user types. If that is no terminal, there are only answers, a line each.
        rng: Draws the order of blind answers.

    Raises:
        RunDirectoryError: the run has no directions.
        ChatError: the transcript can't be written; or, where nobody types, a command is wrong.
    """
    if options.save is not None:
        refuse_taken(options.save)
    directions = directory.directions()
    if directions is None:
        raise RunDirectoryError(f"{directory.path} has no directions; start a new run")
    prefix = tuple(directory.read_environment()["response_prefix"])
    setup = TrialSetup(directions, prefix, directory.tuning())
    name = directory.read_recipe().model.name
    replica = Replica(
        directory.pin_revision(directory.read_recipe()),
        resolve_model(name, SilentProgress().note),
        {},
    )
    edited, rng = Speaker.of(trial), rng or random.Random()
    session = Session(directory, replica, setup, options.tokens, edited, options.mode, rng)
    session.seat(options.mode)
    interactive = source.isatty()
    if interactive:
        greet(directory, trial, session, output)
    try:
        while (line := next_line(output, source)) not in (None, "/quit"):
            assert line is not None
            if line.startswith("/"):
                _command(session, line, output, interactive)
            elif line:
                session.ask(line, view_for(output, interactive, len(session.seats)))
    finally:
        if options.save is not None:
            told = session.save(options.save)
            _say(output, told if interactive else "")
    if interactive and session.votes:
        _say(output, "\n".join(session.tally()))


def greet(directory: RunDirectory, trial: Trial, session: Session, output: Console) -> None:
    """Say who talks, and how the trial scored."""
    _say(output, f"{directory.read_recipe().model.name}: {session.who}")
    baseline = directory.baseline()
    for score in trial.scorecard.scores if trial.scorecard else ():
        base = f" (original: {describe_score(baseline.scorecard[score.name])})" if baseline else ""
        _say(output, f"  {score.name}: {describe_score(score)}{base}")
    _say(output, HELP)


def next_line(output: Console, source: TextIO) -> str | None:
    """The next line without blanks around it; None at the end, or at Ctrl-C."""
    try:
        if source.isatty():
            output.print("\n> ", end="", style="bold")
        line = source.readline()
    except KeyboardInterrupt:
        return None
    if not line and source.isatty():
        output.print()
    return line.strip() if line else None


def _command(session: Session, line: str, output: Console, interactive: bool) -> None:
    """Carry it out. A wrong one is said, and ends a chat in which nobody types."""
    try:
        told = _done(session, line, output, interactive)
    except RayAbliterateError as error:
        if not interactive:
            raise
        told = str(error)
    if interactive:
        _say(output, told)


def _done(session: Session, line: str, output: Console, interactive: bool) -> str:
    """What is said about a command that was carried out.

    Raises:
        RayAbliterateError: it can't be.
    """
    word, _, rest = line.partition(" ")
    takes_more = {"/trial", "/save"}
    if word in COMMANDS and bool(rest) == (word in takes_more):
        return COMMANDS[word](session, rest.strip())
    if word == "/trials" and not rest:
        if interactive:
            _list_trials(session, output)
        return "Talk to one: /trial N"
    raise ChatError(f"{line} is no command.\n{HELP}")


def _list_trials(session: Session, output: Console) -> None:
    baseline = session.directory.baseline()
    frontier = Frontier.of(session.directory.trials())
    output.print(frontier_table(frontier, baseline.scorecard if baseline else None))


def _trial(session: Session, rest: str) -> str:
    if not rest.isdecimal():
        raise ChatError(f"/trial {rest}: {rest!r} is no number of a trial; /trials lists some")
    session.edited = Speaker.of(session.directory.trial(int(rest)))
    session.seat(session.mode)
    return f"now talking to {session.who}"


def _base(session: Session, _: str) -> str:
    session.seat("one", BASE)
    return f"now talking to {session.who}"


def _compare(session: Session, _: str) -> str:
    session.seat("compare")
    return f"now talking to {session.who}"


def _blind(session: Session, _: str) -> str:
    session.seat("blind")
    return f"now talking to {session.who}"


def _reset(session: Session, _: str) -> str:
    session.turns.clear()
    session.seat(session.mode, session.seats[0])
    return "All conversations start over."


COMMANDS: dict[str, Callable[[Session, str], str]] = {
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
        write(output, f"{text}\n")
