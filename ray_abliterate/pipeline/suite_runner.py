"""Runs suites over a pool of replicas: finished trials are measured chunk by chunk.

Any replica may measure a chunk, and measure it again. A few more chunks than there are replicas
are out at once, so that nothing holds a whole data set; a replica that dies costs the chunk it had.
Each result is on the disk before the next is asked for, so a stopped measurement goes on where it
was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_abliterate.errors import RecipeError
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.pipeline.suite_results import BASE, SuiteProgress, SuiteResults, label
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.replica.messages import ReplicaApi
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan

if TYPE_CHECKING:
    from ray_abliterate.cluster.object_store import Reference
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.replica.messages import TrialSetup

AHEAD = 2
"""Chunks that are out for each replica: one is measured, one waits."""


@dataclass(frozen=True)
class MeasuredModel:
    """A model that is measured: its label among the results, and the plan that makes it."""

    name: str
    plan: Plan

    @classmethod
    def of(cls, trial: Trial) -> "MeasuredModel":
        """Return the model that a trial's plan makes, labelled `trial-17`."""
        return cls(label(trial.number), trial.plan)


BASE_MODEL = MeasuredModel(BASE, Plan.nothing())


@dataclass(frozen=True)
class SuiteRunner:
    """Measures models with a pool.

    Attributes:
        pool: Its replicas do the work.
        shared_setup: Reference to the run's setup; None for a model of no run.
        results: Store of the chunks that were measured, now and before.
        progress: Display of stages and steps.
        go_on: Asked now and then whether the model at hand is still wanted.
    """

    pool: "ReplicaPool"
    shared_setup: "Reference[TrialSetup] | None"
    results: SuiteResults
    progress: Progress
    go_on: Callable[[], bool] = lambda: True

    def measure(
        self, model: MeasuredModel, suites: Sequence[Suite], settings: Sequence[SuiteSettings]
    ) -> dict[str, SuiteProgress]:
        """Measure all suites on one model; chunks that are stored are not measured again.

        Args:
            model: The model.
            suites: The suites, as built.
            settings: The suites, as the recipe has them, in the same order.

        Returns:
            What is stored of each suite afterwards.

        Raises:
            RayAbliterateError: a chunk can't be measured; those before it stay stored.
        """
        for suite, setting in zip(suites, settings, strict=True):
            self.measure_suite(model, suite, setting)
        return {suite.name: self.results.of(model.name, suite.name) for suite in suites}

    def measure_suite(self, model: MeasuredModel, suite: Suite, setting: SuiteSettings) -> None:
        """Measure one suite on one model, as far as it is not settled already."""
        stored = self.results.of(model.name, suite.name)
        if stored.whole or (stored.chunks and is_settled(suite, setting, stored.chunks)):
            return
        with self.progress.stage(f"{suite.name}, {model.name}"):
            self._measure_chunks(model, suite, setting, stored)

    def _measure_chunks(
        self, model: MeasuredModel, suite: Suite, setting: SuiteSettings, stored: SuiteProgress
    ) -> None:
        results = {chunk.chunk: chunk for chunk in stored.chunks}
        listed: list[str] = []

        def missing() -> Iterator[Chunk]:
            for chunk in suite.chunks():
                listed.append(chunk.id)
                result = results.get(chunk.id)
                if result is None or result.fingerprint != chunk.fingerprint:
                    yield chunk

        shared_suite = self.pool.put(suite).argument
        setup = self.shared_setup.argument if self.shared_setup is not None else None
        calls = ((shared_suite, chunk, model.plan, setup) for chunk in missing())
        done, most_out = len(results), AHEAD * max(self.pool.replicas, 1)
        for result in self.pool.map(ReplicaApi.measure, calls, most_out, self.go_on):
            results[result.chunk] = result
            self.results.add(model.name, result)
            done += 1
            self.progress.step(done, max(len(listed), done))
            if is_settled(suite, setting, list(results.values())):
                return
        if self.go_on():
            self.results.close(model.name, suite.name, len(listed))


def is_settled(suite: Suite, setting: SuiteSettings, chunks: Sequence[SuiteChunk]) -> bool:
    """Return whether the main score's interval lies on one side of the recipe's limits."""
    least, most = getattr(setting, "at_least", None), getattr(setting, "at_most", None)
    if least is None and most is None:
        return False
    score = suite.summary(chunks)[0]
    return all(limit is None or score.low > limit or score.high < limit for limit in (least, most))


def measure_trials(
    context: RunContext,
    trials: Sequence[Trial],
    settings: Sequence[SuiteSettings],
    base: Path,
    shared_setup: "Reference[TrialSetup]",
) -> None:
    """Measure all suites on the base model, then on each trial.

    Args:
        context: The run; its directory stores the results.
        trials: Finished trials.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        shared_setup: Reference to the setup in the object store.

    Raises:
        RayAbliterateError: a chunk can't be measured; those before it stay stored.
    """
    suites, results = build_suites(settings, base), context.directory.suite_results(settings)
    context.directory.record_facts(suites=[setting.model_dump(mode="json") for setting in settings])
    runner = SuiteRunner(context.pool, shared_setup, results, context.progress)
    for model in (BASE_MODEL, *map(MeasuredModel.of, trials)):
        runner.measure(model, suites, settings)


def chosen_suites(
    settings: Sequence[SuiteSettings], names: Sequence[str]
) -> tuple[SuiteSettings, ...]:
    """Return the suites of these names, or all suites if no name is given.

    Raises:
        RecipeError: there is no suite at all, or none of a name.
    """
    known = {setting.name: setting for setting in settings}
    if not known:
        raise RecipeError(
            "there are no suites: the recipe has no [[suites]].\n"
            "  Write some into a file, and give it with --suites FILE; see docs/evaluation.md"
        )
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no suite {name!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names or known)
