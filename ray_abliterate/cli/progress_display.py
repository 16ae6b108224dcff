"""Show a run while it works: a live panel in a terminal, one line per event otherwise."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_abliterate.cli.tables import finding_text, frontier_table
from ray_abliterate.cli.terminal import is_quiet
from ray_abliterate.pipeline.suite_results import Finding
from ray_abliterate.search.frontier import Frontier, Trial

FRONTIER_ROWS = 12
"""Trials of the frontier that are shown while the search runs; `show` has them all."""
LONG_STAGE = 2.0
"""Seconds from which a stage is worth a line about its duration."""


def open_display(output: Console) -> "LiveDisplay | LineDisplay":
    """Return the display that suits the output; enter it with `with`."""
    return LiveDisplay(output) if output.is_terminal else LineDisplay(output)


class LiveDisplay:
    """A panel that is redrawn: stage, trials done, rate, time left, and the frontier."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=output,
        )
        self._task = self._bar.add_task("starting", total=None, rate="")
        self._frontier: Frontier | None = None
        self._findings: dict[tuple[str, str], Finding] = {}
        self._pruned = 0
        self._clock = _Clock()
        # Where libraries are silenced their streams lead into a log, and must not be led here.
        silenced = is_quiet()
        self._live = Live(
            console=output,
            get_renderable=self._panel,
            refresh_per_second=4,
            redirect_stdout=not silenced,
            redirect_stderr=not silenced,
        )

    def __enter__(self) -> "LiveDisplay":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._frontier = None
        self._bar.stop_task(self._task)
        self._bar.update(self._task, visible=False)
        self._live.__exit__(None, None, None)

    def _panel(self) -> Group:
        if self._frontier is None or not self._frontier:
            return Group(self._bar)
        findings = dict(self._findings)
        table = frontier_table(self._frontier, rows=FRONTIER_ROWS, findings=findings)
        return Group(table, self._bar)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show the stage's name until it ends, then its duration if it was long.

        The search has none: trials per minute say more.
        """
        self._bar.reset(self._task, total=None, description=name, rate="")
        started = time.monotonic()
        self._clock = _Clock()
        yield
        seconds = time.monotonic() - started
        if seconds > LONG_STAGE and name != "search":
            self._console.print(f"[dim]{name}: {seconds:.1f} s[/dim]")

    def step(self, done: int, total: int) -> None:
        """Move the progress bar, and show the time left."""
        rate = self._clock.time_left(done, total)
        self._bar.update(self._task, completed=done, total=total, rate=rate)

    def note(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(text, markup=False)

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Redraw the panel with the new frontier; name a failed trial above it."""
        self._frontier = frontier
        self._pruned += trial.pruned
        rate = self._clock.rate(done, total)
        if self._pruned:
            rate += f", {self._pruned} stopped early"
        self._bar.update(self._task, completed=done, total=total, rate=rate)
        if trial.error is not None:
            self.note(f"trial {trial.number} failed: {trial.error}")

    def finding(self, model: str, suite: str, finding: Finding, ended: bool) -> None:
        """Redraw the panel with what a suite measured so far."""
        self._findings[model, suite] = finding


class LineDisplay:
    """A display that prints one line per event, for logs and pipes."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._clock = _Clock()

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the output as it is, since every line is whole."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print how long the stage took, if it was long."""
        started = time.monotonic()
        self._clock = _Clock()
        yield
        seconds = time.monotonic() - started
        if seconds > LONG_STAGE:
            self.note(f"{name}: {seconds:.1f} s")

    def step(self, done: int, total: int) -> None:
        """Print nothing, since the stage says how long it took."""

    def note(self, text: str) -> None:
        """Print the text as one line, however wide."""
        self._console.print(text, markup=False, soft_wrap=True)

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Print one line: count, number, scores, time left."""
        if trial.scorecard is None:
            result = f"failed: {trial.error}"
        else:
            scores = trial.scorecard.scores
            result = "  ".join(f"{s.name} {s.relation}{s.value:.4g}" for s in scores)
            if trial.pruned:
                better = frontier.better_than(trial)
                result += f"  (stopped early: trial {better.number} is better)" if better else ""
            if any(member.number == trial.number for member in frontier.members):
                result += "  (frontier)"
        rate = self._clock.rate(done, total)
        self.note(f"[{done}/{total}] trial {trial.number}: {result}  {rate}")

    def finding(self, model: str, suite: str, finding: Finding, ended: bool) -> None:
        """Print one line once the suite is done with the model."""
        if ended:
            self.note(f"{model}: {suite} {finding_text(finding)}".replace("\n", ", "))


class _Clock:
    """Measures the rate since the first report, and estimates the time left."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._before: int | None = None  # done before the first report

    def rate(self, done: int, total: int) -> str:
        """Return a text such as `9.1 trials/min, 3:20 left`, with the time since the start."""
        if self._before is None:
            self._before = done - 1
        elapsed = max(time.monotonic() - self._started, 1e-6)
        per_second = (done - self._before) / elapsed
        return f"{60 * per_second:.1f} trials/min, {_minutes((total - done) / per_second)} left"

    def time_left(self, done: int, total: int) -> str:
        """Return a text such as `3:20 left`; an empty one before the second report."""
        if self._before is None:
            self._before, self._started = done, time.monotonic()
        elapsed, steps = time.monotonic() - self._started, done - self._before
        return f"{_minutes((total - done) * elapsed / steps)} left" if steps else ""


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
