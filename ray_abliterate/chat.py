"""A conversation with the original and the edited model, side by side."""

from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.frontier import Trial
from ray_abliterate.live import describe_score
from ray_abliterate.plan import Plan
from ray_abliterate.progress import Unwatched
from ray_abliterate.replica import Replica, Setup
from ray_abliterate.run import model_source
from ray_abliterate.rundir import RunDirectory

HELP = "/reset starts over, /quit leaves, /help shows this; Ctrl-C ends an answer."
INTERRUPTED = "(interrupted; this turn is forgotten)"
SILENT = "(no text)"


@dataclass
class Side:
    """One of the two models, with its own conversation."""

    name: str
    plan: Plan
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, replica: Replica, setup: Setup, tokens: int) -> str:
        """The model's next turn; one that is interrupted leaves the conversation as it was."""
        asked = [*self.turns, {"role": "user", "content": text}]
        try:
            answer = replica.respond(asked, self.plan, setup, tokens)
        except KeyboardInterrupt:
            return INTERRUPTED
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer.strip() or SILENT


def converse(
    directory: RunDirectory, trial: Trial, output: Console, source: TextIO, tokens: int
) -> None:
    """Answer lines of `source` with both models until it ends.

    Args:
        directory: The run.
        trial: The trial whose plan makes the edited model.
        output: Where answers go: panels in a terminal, labelled lines otherwise.
        source: What the user types; `/help` lists the commands.
        tokens: Most tokens of an answer.

    Raises:
        RunDirectoryError: the run has no directions.
    """
    directions = directory.directions()
    if directions is None:
        raise RunDirectoryError(f"{directory.path} has no directions; start a new run")
    prefix = tuple(directory.environment["response_prefix"])
    setup = Setup(directions, prefix, directory.tuning())
    recipe = directory.recipe
    replica = Replica(
        directory.pinned(recipe), model_source(recipe.model.name, Unwatched().note), {}
    )
    greet(directory, trial, output)
    sides = _sides(trial)
    while (line := next_line(output, source)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            sides = _sides(trial)
            output.print("Both conversations start over.")
        elif line.startswith("/"):
            _say(output, HELP if line == "/help" else f"{line} is no command. {HELP}")
        elif line:
            with output.status("answering"):
                answers = [(side.name, side.answer(line, replica, setup, tokens)) for side in sides]
            show(answers, output)


def greet(directory: RunDirectory, trial: Trial, output: Console) -> None:
    """Say which models talk, and how they scored."""
    _say(output, f"{directory.recipe.model.name}: the original, and trial {trial.number}")
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
    return line.strip() if line else None


def show(answers: list[tuple[str, str]], output: Console) -> None:
    """The answers beside each other in a terminal, one after the other elsewhere."""
    if not output.is_terminal:
        for name, answer in answers:
            _say(output, f"{name}: {_printable(answer)}")
        return
    table = Table.grid(expand=True)
    for _ in answers:
        table.add_column(ratio=1)
    panels = [Panel(Text(_printable(a)), title=name, title_align="left") for name, a in answers]
    table.add_row(*panels)
    output.print(table)


def _sides(trial: Trial) -> tuple[Side, Side]:
    return Side("original", Plan.nothing()), Side(f"trial {trial.number}", trial.plan)


def _say(output: Console, text: str) -> None:
    output.print(text, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """A model's text cannot steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
