"""Validation: the recipe's suites on the frontier, during the search and after it.

During the search, replicas of the evaluation's own measure the frontier in the background. A trial
that falls off the frontier is not measured further; what was measured of it stays stored.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.pipeline.progress import Progress, SilentProgress
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.pipeline.suite_results import SuiteResults
from ray_abliterate.pipeline.suite_runner import (
    BASE_MODEL,
    MeasuredModel,
    SuiteRunner,
    is_settled,
    measure_trials,
)
from ray_abliterate.search.frontier import Frontier

if TYPE_CHECKING:
    from ray_abliterate.cluster.object_store import Reference
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.replica.messages import TrialSetup

REPORT_SECONDS = 2.0
"""How often the state of a suite is shown while it is measured."""

StartPool = Callable[[Callable[[], bool]], AbstractContextManager["ReplicaPool"]]
"""Starts the evaluation's own replicas; its argument says whether they are still wanted."""


def validate_after_search(context: RunContext, shared_setup: "Reference[TrialSetup]") -> None:
    """Measure what is missing of the frontier, on all of the run's replicas."""
    settings = context.directory.read_recipe().suites
    if settings:
        members = Frontier.of(context.directory.trials()).members
        measure_trials(context, members, settings, context.base, shared_setup)


@contextmanager
def validate_during_search(
    context: RunContext, shared_setup: "Reference[TrialSetup]"
) -> Iterator[Callable[[Frontier], None]]:
    """Measure the frontier in the background of the block, if the recipe has replicas for it.

    Yields:
        A function to call with each new frontier.
    """
    recipe = context.directory.read_recipe()
    if not recipe.evaluation.replicas:
        yield lambda frontier: None
        return
    pinned = context.directory.pin_revision(recipe)
    start = partial(context.pool.evaluators, pinned, context.source, context.record.record)
    validation = Validation(context, start, shared_setup)
    validation.update(Frontier.of(context.directory.trials()))
    with validation:
        yield validation.update


class Validation:
    """Measures the base model, then the members of the frontier, in a thread of its own."""

    def __init__(
        self, context: RunContext, start: StartPool, shared_setup: "Reference[TrialSetup]"
    ) -> None:
        """Build the suites; nothing is measured before the block begins.

        Args:
            context: The run. Its base is the folder that the suites' files are looked up in.
            start: Starts the evaluation's own replicas.
            shared_setup: Reference to the setup in the object store.

        Raises:
            RayAbliterateError: a suite's files can't be read.
        """
        directory = context.directory
        self._settings = directory.read_recipe().suites
        self._suites = build_suites(self._settings, context.base)
        self._results = directory.suite_results(self._settings)
        self._start, self._shared_setup = start, shared_setup
        self._notify, self._progress = context.record.notify, context.progress
        self._wanted: dict[str, MeasuredModel] = {BASE_MODEL.name: BASE_MODEL}
        self._done: set[str] = set()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="validation", daemon=True)
        directory.record_facts(
            suites=[setting.model_dump(mode="json") for setting in self._settings]
        )

    def __enter__(self) -> "Validation":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def update(self, frontier: Frontier) -> None:
        """Replace the models that are wanted by the base model and this frontier's members."""
        members = [MeasuredModel.of(trial) for trial in frontier.members]
        with self._changed:
            self._wanted = {model.name: model for model in (BASE_MODEL, *members)}
            self._changed.notify()

    def _work(self) -> None:
        try:
            with self._start(lambda: not self._closing) as pool:
                while (model := self._next()) is not None:
                    self._measure(pool, model)
        except Exception as error:  # noqa: BLE001  # the search goes on, and all is measured after it
            if not self._closing:
                self._notify("validation-stopped", reason=str(error).splitlines()[0])

    def _next(self) -> MeasuredModel | None:
        """Wait for a model to measure: the base model, then members by number; None at the end."""
        with self._changed:
            while not self._closing:
                missing = [m for name, m in self._wanted.items() if name not in self._done]
                if missing:
                    return min(missing, key=lambda m: (m != BASE_MODEL, len(m.name), m.name))
                self._changed.wait()
        return None

    def _measure(self, pool: "ReplicaPool", model: MeasuredModel) -> None:
        def wanted() -> bool:
            return not self._closing and model.name in self._wanted

        for suite, setting in zip(self._suites, self._settings, strict=True):
            reporter = _SuiteReporter(self._results, suite, model.name, self._progress)
            runner = SuiteRunner(pool, self._shared_setup, self._results, reporter, wanted)
            try:
                runner.measure_suite(model, suite, setting)
            except RayAbliterateError as error:
                self._notify("validation-failed", model=model.name, reason=str(error))
                break
            state = self._results.of(model.name, suite.name)
            if not wanted():
                if not self._closing:
                    self._notify("validation-cancelled", model=model.name)
                return
            reporter.report(state.whole or is_settled(suite, setting, state.chunks))
        self._done.add(model.name)


class _SuiteReporter(SilentProgress):
    """Reports the state of one suite of one model now and then, in place of each step."""

    def __init__(self, results: SuiteResults, suite: Suite, model: str, progress: Progress) -> None:
        self._results, self._suite, self._model = results, suite, model
        self._progress = progress
        self._reported_at = time.monotonic()

    def step(self, done: int, total: int) -> None:
        """Report, unless that was done a moment ago."""
        if time.monotonic() - self._reported_at > REPORT_SECONDS:
            self._reported_at = time.monotonic()
            self.report(False)

    def report(self, ended: bool) -> None:
        """Pass what the suite says so far on to the display."""
        finding = self._results.finding(self._model, self._suite)
        if finding is not None:
            self._progress.finding(self._model, self._suite.name, finding, ended)
