"""Shows a run as it goes: a live panel in a terminal, plain lines otherwise."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_abliterate.cli.tables import finding_text, frontier_table
from ray_abliterate.pipeline.suite_results import (
    Finding,
)
from ray_abliterate.search.frontier import Frontier, Trial

FRONTIER_ROWS = 12
"""Members shown while the search runs; `show` has them all."""


def open_display(output: Console) -> "LiveDisplay | LineDisplay":
    """What fits where the output goes; to be opened with `with`."""
    return LiveDisplay(output) if output.is_terminal else LineDisplay(output)


class LiveDisplay:
    """A panel that is redrawn: stage, trials done, rate, time left, frontier."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=output,
        )
        self._task = self._progress.add_task("starting", total=None, rate="")
        self._frontier: Frontier | None = None
        self._findings: dict[tuple[str, str], Finding] = {}
        self._stopped = 0
        self._clock = _Clock()
        self._live = Live(console=output, get_renderable=self._panel, refresh_per_second=4)

    def __enter__(self) -> "LiveDisplay":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._frontier = None
        self._progress.stop_task(self._task)
        self._progress.update(self._task, visible=False)
        self._live.__exit__(None, None, None)

    def _panel(self) -> Group:
        if self._frontier is None or not self._frontier:
            return Group(self._progress)
        known = dict(self._findings)
        table = frontier_table(self._frontier, rows=FRONTIER_ROWS, findings=known)
        return Group(table, self._progress)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show the stage's name until it ends."""
        self._progress.reset(self._task, total=None, description=name, rate="")
        started = time.monotonic()
        self._clock = _Clock()
        yield
        seconds = time.monotonic() - started
        if seconds > 2 and name != "search":
            self._console.print(f"[dim]{name}: {seconds:.1f} s[/dim]")

    def step(self, done: int, total: int) -> None:
        """Move the bar."""
        rate = self._clock.left(done, total)
        self._progress.update(self._task, completed=done, total=total, rate=rate)

    def note(self, text: str) -> None:
        """Print above the panel."""
        self._console.print(text, markup=False)

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Redraw with the new frontier."""
        self._frontier = frontier
        self._stopped += trial.pruned
        rate = self._clock.describe(done, total)
        if self._stopped:
            rate += f", {self._stopped} stopped early"
        self._progress.update(self._task, completed=done, total=total, rate=rate)
        if trial.error is not None:
            self.note(f"trial {trial.number} failed: {trial.error}")

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """Redraw with it."""
        self._findings[model, suite] = found


class LineDisplay:
    """One line per event, for logs and pipes."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._clock = _Clock()

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to tidy."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say how long it took, if it took long."""
        started = time.monotonic()
        self._clock = _Clock()
        yield
        seconds = time.monotonic() - started
        if seconds > 2:
            self.note(f"{name}: {seconds:.1f} s")

    def step(self, done: int, total: int) -> None:
        """Quiet: the stage says how long it took."""

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """One line: count, number, scores, time left."""
        if trial.scorecard is None:
            result = f"failed: {trial.error}"
        else:
            scores = trial.scorecard.scores
            result = "  ".join(f"{s.name} {s.relation}{s.value:.4g}" for s in scores)
            if trial.pruned:
                better = frontier.better_than(trial)
                result += f"  (stopped: trial {better.number} is better)" if better else ""
            if any(member.number == trial.number for member in frontier.members):
                result += "  (frontier)"
        rate = self._clock.describe(done, total)
        self.note(f"[{done}/{total}] trial {trial.number}: {result}  {rate}")

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """One line, once it is all there."""
        if ended:
            self.note(f"{model}: {suite} {finding_text(found)}".replace("\n", ", "))


class _Clock:
    """Rate and time left, from the trials since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._before: int | None = None

    def describe(self, done: int, total: int) -> str:
        """`9.1 trials/min, 3:20 left`."""
        if self._before is None:
            self._before = done - 1
        elapsed = max(time.monotonic() - self._started, 1e-6)
        per_second = (done - self._before) / elapsed
        return f"{60 * per_second:.1f} trials/min, {_minutes((total - done) / per_second)} left"

    def left(self, done: int, total: int) -> str:
        """`3:20 left`, once that can be told."""
        if self._before is None:
            self._before, self._started = done, time.monotonic()
        elapsed, since = time.monotonic() - self._started, done - self._before
        return f"{_minutes((total - done) * elapsed / since)} left" if since else ""


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
