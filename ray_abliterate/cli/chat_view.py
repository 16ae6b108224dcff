"""Answers as they are written: in columns, one after the other, or a line each. Knows no models."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

COLUMNS_WIDTH = 80
"""Characters from which two answers stand beside each other."""
FRAME = 4
"""Characters that a panel's sides take, and lines that its edges and the prompt take."""
SILENT = "(no text)"
STOPPED = "(stopped)"


class View(Protocol):
    """Shows the answers to one question; of each its text, piece by piece."""

    def answers(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A block in which answers under these names are shown."""

    def piece(self, place: int, text: str) -> None:
        """More text of the answer in this place."""

    def end(self, place: int, answer: str, stopped: bool) -> None:
        """The answer is whole, or was stopped."""


def view_for(output: Console, interactive: bool, answers: int) -> View:
    """What fits: columns need room, and pipes get one line an answer."""
    if not interactive:
        return Lines(output)
    beside = answers > 1 and output.is_terminal and output.width >= COLUMNS_WIDTH
    return Columns(output) if beside else Scroll(output)


class Lines:
    """A line for each answer, its line breaks written as `\\n`; names only if there are several."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Nothing is shown before an answer ends."""
        self._names = names
        yield

    def piece(self, place: int, text: str) -> None:
        """Waits for the end."""

    def end(self, place: int, answer: str, stopped: bool) -> None:
        """The line."""
        name = f"{self._names[place]}: " if len(self._names) > 1 else ""
        text = answer.strip().replace("\\", "\\\\").replace("\n", "\\n")
        write(self._output, f"{name}{printable(text)}\n")


class Scroll:
    """One answer after the other, under its name."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()
        self._shown = ""
        self._place = -1

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Each name comes with its answer's first text."""
        self._names, self._place = names, -1
        yield

    def piece(self, place: int, text: str) -> None:
        """Written at once."""
        if place != self._place:
            self._place, self._shown = place, ""
            self._output.print(f"{self._names[place]}: ", end="", style="bold", markup=False)
        begun = bool(self._shown.strip())
        self._shown += text
        write(self._output, printable(text if begun else text.lstrip()))

    def end(self, place: int, answer: str, stopped: bool) -> None:
        """What is left of it, and a mark."""
        self.piece(place, "")
        self.piece(place, answer.removeprefix(self._shown))
        words = [*([] if answer.strip() else [SILENT]), *([STOPPED] if stopped else [])]
        write(self._output, " ".join(["", *words] if words and answer.strip() else words) + "\n")


class Columns:
    """Answers beside each other; of long ones the last lines while they are written."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()
        self._texts: list[str] = []
        self._live: Live | None = None

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Redrawn as text comes; whole at the end."""
        self._names, self._texts = names, [""] * len(names)
        with Live(self._table(whole=False), console=self._output, refresh_per_second=10) as live:
            self._live = live
            try:
                yield
            finally:
                live.update(self._table(whole=True))
                self._live = None

    def piece(self, place: int, text: str) -> None:
        """Seen at the next redrawing."""
        self._texts[place] += text
        if self._live is not None:
            self._live.update(self._table(whole=False))

    def end(self, place: int, answer: str, stopped: bool) -> None:
        """The text as it is, and a mark."""
        mark = f" {STOPPED}" if stopped else ""
        self._texts[place] = (answer.strip() or SILENT) + mark
        self.piece(place, "")

    def _table(self, whole: bool) -> Table:
        table = Table.grid(expand=True)
        for _ in self._names:
            table.add_column(ratio=1)
        width = self._output.width // max(len(self._names), 1) - FRAME
        panels = []
        for name, shown in zip(self._names, self._texts, strict=True):
            text = Text(printable(shown.strip()))
            if not whole:
                last = text.wrap(self._output, width)[-max(self._output.height - FRAME, 1) :]
                text = Text("\n").join(last)
            panels.append(Panel(text, title=Text(name), title_align="left"))
        table.add_row(*panels)
        return table


def write(output: Console, text: str) -> None:
    """As it is: no markup, no line breaks of our own."""
    output.print(text, end="", markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """A model's text cannot steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
