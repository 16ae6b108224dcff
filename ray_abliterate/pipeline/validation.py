"""Validation: the recipe's suites on the frontier, while the search goes on and after it.

While it goes on, replicas of the evaluation's own measure, beside the search's. A trial that falls
off the frontier is of no interest any more: what was measured of it is kept, the rest is not done.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.evaluation.suites.build import build
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Unwatched, Watch
from ray_abliterate.pipeline.search_stage import Record
from ray_abliterate.pipeline.suite_results import Measurements
from ray_abliterate.pipeline.suite_runner import (
    BASE_MODEL,
    Measurer,
    Subject,
    measure_trials,
    settled,
)
from ray_abliterate.search.frontier import Frontier

TELL_SECONDS = 2.0
"""How often what is known of a suite is told while it is measured."""

Start = Callable[[Callable[[], bool]], Any]
"""Makes a pool, in a context; handed the question whether it is still wanted."""


def validate(directory: RunDirectory, base: Path, pool: Any, shared: Any, watch: Watch) -> None:
    """What is not measured yet of the frontier, once the search has ended."""
    settings = directory.recipe.suites
    if settings:
        members = Frontier.of(directory.trials()).members
        measure_trials(directory, members, settings, base, pool, shared, watch)


@contextmanager
def validating(
    directory: RunDirectory,
    base: Path,
    source: str,
    pool: ReplicaPool,
    shared: Any,
    record: Record,
    watch: Watch,
) -> Iterator[Callable[[Frontier], None]]:
    """Measure the frontier in the background during the block, if the recipe has replicas for it.

    Yields:
        What is to be told of each new frontier.
    """
    recipe = directory.recipe
    if not recipe.evaluation.replicas:
        yield lambda frontier: None
        return
    start = partial(pool.evaluators, directory.pinned(recipe), source, record.event)
    validation = Validation(directory, base, start, shared, record.tell, watch)
    validation.frontier(Frontier.of(directory.trials()))
    with validation:
        yield validation.frontier


class Validation:
    """Measures the base model, then what is on the frontier, in a thread of its own."""

    def __init__(
        self,
        directory: RunDirectory,
        base: Path,
        start: Start,
        shared: Any,
        tell: Callable[..., None],
        watch: Watch,
    ) -> None:
        """Measure nothing yet.

        Args:
            directory: The run's.
            base: Folder that the suites' files are looked up in.
            start: Makes the pool of the evaluation's own replicas.
            shared: Reference to the run's setup.
            tell: Told what happened: name of the event, and details.
            watch: Told what is found.
        """
        self._settings = directory.recipe.suites
        self._suites = build(self._settings, base)
        self._kept = directory.measurements(self._settings)
        self._start, self._shared, self._tell, self._watch = start, shared, tell, watch
        self._wanted: dict[str, Subject] = {BASE_MODEL.name: BASE_MODEL}
        self._done: set[str] = set()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="validation", daemon=True)
        directory.note(suites=[setting.model_dump(mode="json") for setting in self._settings])

    def __enter__(self) -> "Validation":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def frontier(self, frontier: Frontier) -> None:
        """This is the frontier now."""
        members = [Subject.of(trial) for trial in frontier.members]
        with self._changed:
            self._wanted = {subject.name: subject for subject in (BASE_MODEL, *members)}
            self._changed.notify()

    def _work(self) -> None:
        try:
            with self._start(lambda: not self._closing) as pool:
                while (subject := self._next()) is not None:
                    self._measure(pool, subject)
        except Exception as error:  # noqa: BLE001  # the search goes on, and all is measured after it
            if not self._closing:
                self._tell("validation-stopped", reason=str(error).splitlines()[0])

    def _next(self) -> Subject | None:
        """The base model, then who has been on the frontier longest; None at the end."""
        with self._changed:
            while not self._closing:
                left = [s for name, s in self._wanted.items() if name not in self._done]
                if left:
                    return min(left, key=lambda s: (s != BASE_MODEL, len(s.name), s.name))
                self._changed.wait()
        return None

    def _measure(self, pool: Any, subject: Subject) -> None:
        def wanted() -> bool:
            return not self._closing and subject.name in self._wanted

        for suite, setting in zip(self._suites, self._settings, strict=True):
            teller = _Teller(self._kept, suite, subject.name, self._watch)
            measurer = Measurer(pool, self._shared, self._kept, teller, wanted)
            try:
                measurer.suite(subject, suite, setting)
            except RayAbliterateError as error:
                self._tell("validation-failed", model=subject.name, reason=str(error))
                break
            known = self._kept.of(subject.name, suite.name)
            if not wanted():
                if not self._closing:
                    self._tell("validation-cancelled", model=subject.name)
                return
            teller.tell(known.whole or settled(suite, setting, known.chunks))
        self._done.add(subject.name)


class _Teller(Unwatched):
    """Says what is known of one suite of one model, now and then."""

    def __init__(self, kept: Measurements, suite: Suite, model: str, watch: Watch) -> None:
        self._kept, self._suite, self._model, self._watch = kept, suite, model, watch
        self._told = time.monotonic()

    def step(self, done: int, total: int) -> None:
        """One chunk more."""
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(False)

    def tell(self, ended: bool) -> None:
        """So much is known now."""
        found = self._kept.finding(self._model, self._suite)
        if found is not None:
            self._watch.finding(self._model, self._suite.name, found, ended)
