"""Show answers while they are written: in columns, one after the other, or a line each.

Knows nothing about models.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ray_abliterate.cli.terminal import is_quiet

COLUMNS_WIDTH = 80
"""Width, in characters, from which on two answers stand side by side."""
FRAME = 4
"""Characters that a panel's sides take, and lines that its edges and the prompt take."""
SILENT = "(no text)"
STOPPED = "(stopped)"


class ChatView(Protocol):
    """Shows the answers to one question while their text arrives."""

    def answers(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Return a context in which answers with these names are shown."""

    def add_text(self, place: int, text: str) -> None:
        """Show further text of the answer at index `place`."""

    def finish(self, place: int, answer: str, stopped: bool) -> None:
        """Show the rest of an answer that is whole, or was stopped."""


def open_view(output: Console, interactive: bool, answers: int) -> ChatView:
    """Return a view that suits the output: columns need room, and pipes get a line per answer."""
    if not interactive:
        return LineView(output)
    side_by_side = answers > 1 and output.is_terminal and output.width >= COLUMNS_WIDTH
    return ColumnView(output) if side_by_side else ScrollView(output)


class LineView:
    """A line per answer, with line breaks written as `\\n`, and with names if there are several."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Remember the names; nothing is shown before an answer ends."""
        self._names = names
        yield

    def add_text(self, place: int, text: str) -> None:
        """Ignore the text, since the whole answer comes at its end."""

    def finish(self, place: int, answer: str, stopped: bool) -> None:
        """Print the answer as one line."""
        name = f"{self._names[place]}: " if len(self._names) > 1 else ""
        text = answer.strip().replace("\\", "\\\\").replace("\n", "\\n")
        print_plain(self._output, f"{name}{printable(text)}\n")


class ScrollView:
    """One answer after the other, each after its name."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()
        self._shown = ""
        self._place = -1

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Remember the names; each is printed before its answer's first text."""
        self._names, self._place = names, -1
        yield

    def add_text(self, place: int, text: str) -> None:
        """Print the text at once, after the name if the answer begins."""
        if place != self._place:
            self._place, self._shown = place, ""
            self._output.print(f"{self._names[place]}: ", end="", style="bold", markup=False)
        has_begun = bool(self._shown.strip())
        self._shown += text
        print_plain(self._output, printable(text if has_begun else text.lstrip()))

    def finish(self, place: int, answer: str, stopped: bool) -> None:
        """Print what is left of the answer, and whether it is empty or was stopped."""
        self.add_text(place, "")
        self.add_text(place, answer.removeprefix(self._shown))
        marks = [*([] if answer.strip() else [SILENT]), *([STOPPED] if stopped else [])]
        print_plain(
            self._output, " ".join(["", *marks] if marks and answer.strip() else marks) + "\n"
        )


class ColumnView:
    """Answers side by side; of a long one only the last lines while it is written."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._names: Sequence[str] = ()
        self._texts: list[str] = []
        self._live: Live | None = None

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[None]:
        """Redraw both answers while text arrives, and show them whole at the end."""
        self._names, self._texts = names, [""] * len(names)
        with Live(
            self._table(whole=False),
            console=self._output,
            refresh_per_second=10,
            redirect_stdout=not is_quiet(),
            redirect_stderr=not is_quiet(),
        ) as live:
            self._live = live
            try:
                yield
            finally:
                live.update(self._table(whole=True))
                self._live = None

    def add_text(self, place: int, text: str) -> None:
        """Add text, which shows with the next redraw."""
        self._texts[place] += text
        if self._live is not None:
            self._live.update(self._table(whole=False))

    def finish(self, place: int, answer: str, stopped: bool) -> None:
        """Replace the text by the whole answer, and mark one that was stopped."""
        mark = f" {STOPPED}" if stopped else ""
        self._texts[place] = (answer.strip() or SILENT) + mark
        self.add_text(place, "")

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


def print_plain(output: Console, text: str) -> None:
    """Print text as it is, without markup and without line breaks of our own."""
    output.print(text, end="", markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """Replace control characters, so that a model's text cannot control the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
