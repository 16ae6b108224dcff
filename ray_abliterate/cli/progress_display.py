"""Shows a run as it goes: a live panel in a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ray_abliterate.directions.layer_selection import HEAD, Selection
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.pipeline.suite_results import (
    BASE,
    Finding,
    Measurements,
    comparison_text,
    label,
)
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.score import Score, Scorecard

FRONTIER_ROWS = 12
"""Members shown while the search runs; `show` has them all."""


def console() -> Console:
    """Where people read: standard output, at a sensible width when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def describe_score(score: Score) -> str:
    """A score in a few characters: value, counts if it has them, interval; of a bound, `≥ 0.25`."""
    hits, total = score.detail.get("hits"), score.detail.get("total")
    counts = f" {hits}/{total}" if hits is not None and total is not None else ""
    interval = "" if score.bound else f" [{score.low:.3g}, {score.high:.3g}]"
    return f"{score.relation}{score.value:.4g}{counts}{interval}"


def count_trials(trials: Sequence[Trial], wanted: int | None = None) -> str:
    """`40 of 200 trials, 11 stopped early, 0 failed`."""
    stopped = sum(trial.bounded for trial in trials)
    failed = sum(trial.error is not None for trial in trials)
    count = f"{len(trials)} of {wanted}" if wanted else f"{len(trials)}"
    return f"{count} trials, {stopped} stopped early, {failed} failed"


def frontier_table(
    frontier: Frontier,
    baseline: Scorecard | None = None,
    rows: int | None = None,
    findings: Mapping[tuple[str, str], Finding] | None = None,
) -> Table:
    """The frontier, the base model on top, the knee marked; by model and suite, what was found."""
    table = Table(title="Frontier", title_justify="left", show_edge=False, pad_edge=False)
    cards = [t.scorecard for t in frontier.members if t.scorecard]
    cards += [baseline] if baseline else []
    names = [score.name for score in cards[0].scores] if cards else []
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(name)
    suites = list(dict.fromkeys(suite for _, suite in findings or ()))
    for suite in suites:
        table.add_column(suite)
    table.add_column("scope")
    table.add_column("seconds", justify="right")

    def cells(model: str) -> Iterator[str]:
        return (_cell((findings or {}).get((model, suite))) for suite in suites)

    if baseline is not None:
        scores = (describe_score(score) for score in baseline.scores)
        table.add_row(BASE, *scores, *cells(BASE), "", "")
    members = _thinned(frontier.members, rows)
    knee = frontier.knee.number if frontier else None
    for trial in members:
        assert trial.scorecard is not None
        mark = " ◆" if trial.number == knee else ""
        where = f"layer {trial.plan.direction_layer:.1f}"
        scope = where if trial.plan.scope == "global" else trial.plan.scope
        scores = (describe_score(score) for score in trial.scorecard.scores)
        found = cells(label(trial.number))
        table.add_row(f"{trial.number}{mark}", *scores, *found, scope, f"{trial.seconds:.1f}")
    if len(members) < len(frontier):
        table.caption = f"{len(members)} of {len(frontier)} members"
    return table


def layers_table(selection: Selection) -> Table:
    """What layers' directions do to held-out prompts."""
    title = "Directions by layer, on held-out prompts"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for place, heading in enumerate(HEAD):
        table.add_column(heading, justify="right" if 0 < place < len(HEAD) - 1 else "left")
    for row in selection.rows():
        table.add_row(*row)
    table.caption, table.caption_justify = selection.sentence(), "left"
    return table


def foreign_table(found: Mapping[str, Any], rows: int | None = None) -> Table:
    """What another tool found of the plans that came from it."""
    title = f"As scored by {found['tool']}, not by this run"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    known = found["trials"][:rows]
    names = list(known[0]["scores"]) if known else []
    for heading in ("trial", "its number there", *names):
        table.add_column(heading)
    for trial in known:
        scores = (trial["scores"].get(name, "") for name in names)
        table.add_row(str(trial["number"]), str(trial["index"]), *scores)
    if len(known) < len(found["trials"]):
        table.caption = f"{len(known)} of {len(found['trials'])} trials"
    return table


def suites_table(kept: Measurements, suites: Sequence[Suite]) -> Table:
    """The main score of each suite: a row per model, beside the base model's."""
    table = Table(title="Suites", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("model")
    for suite in suites:
        table.add_column(suite.name)
    for model in kept.labels:
        table.add_row(model, *(_cell(kept.finding(model, suite)) for suite in suites))
    table.caption = "below: difference from the base model on the same items; * not all chunks"
    return table


def _cell(found: Finding | None) -> str:
    if found is None:
        return ""
    text = (describe_score(found.score) if found.score else "kept") + ("" if found.whole else " *")
    return f"{text}\n{comparison_text(found.comparison)}" if found.comparison else text


def _thinned(members: tuple[Trial, ...], rows: int | None) -> tuple[Trial, ...]:
    """At most so many members, both ends among them."""
    if rows is None or len(members) <= rows:
        return members
    step = (len(members) - 1) / (rows - 1)
    return tuple(members[round(i * step)] for i in range(rows))


def watching(output: Console) -> "LiveWatch | LineWatch":
    """What fits where the output goes; to be opened with `with`."""
    return LiveWatch(output) if output.is_terminal else LineWatch(output)


class LiveWatch:
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

    def __enter__(self) -> "LiveWatch":
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
        self._stopped += trial.bounded
        rate = self._clock.describe(done, total)
        if self._stopped:
            rate += f", {self._stopped} stopped early"
        self._progress.update(self._task, completed=done, total=total, rate=rate)
        if trial.error is not None:
            self.note(f"trial {trial.number} failed: {trial.error}")

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """Redraw with it."""
        self._findings[model, suite] = found


class LineWatch:
    """One line per event, for logs and pipes."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._clock = _Clock()

    def __enter__(self) -> "LineWatch":
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
            if trial.bounded:
                better = frontier.better_than(trial)
                result += f"  (stopped: trial {better.number} is better)" if better else ""
            if any(member.number == trial.number for member in frontier.members):
                result += "  (frontier)"
        rate = self._clock.describe(done, total)
        self.note(f"[{done}/{total}] trial {trial.number}: {result}  {rate}")

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """One line, once it is all there."""
        if ended:
            self.note(f"{model}: {suite} {_cell(found)}".replace("\n", ", "))


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
