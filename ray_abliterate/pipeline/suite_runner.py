"""Suites over a pool of replicas: what is measured of finished trials, chunk by chunk.

A chunk may be measured by anybody, and again. A few more than there are replicas are out at once,
so nothing holds a whole data set; a replica that dies costs the chunk it had. Each result is on the
disk before the next is asked for, so a stopped measurement goes on where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.errors import RecipeError
from ray_abliterate.evaluation.suites.build import build
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.pipeline.suite_results import BASE, Measurements, Progress, label
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan

AHEAD = 2
"""Chunks that are out for each replica: one is measured, one waits."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured: its name among the results, and the plan that makes it."""

    name: str
    plan: Plan

    @classmethod
    def of(cls, trial: Trial) -> "Subject":
        """A trial's."""
        return cls(label(trial.number), trial.plan)


BASE_MODEL = Subject(BASE, Plan.nothing())


@dataclass(frozen=True)
class Measurer:
    """Measures models with a pool.

    Attributes:
        pool: Its replicas do the work.
        shared: Reference to the run's setup.
        kept: Takes the results, and has those of before.
        watch: Is told how far it is.
        go_on: Asked now and then whether the model at hand is still of interest.
    """

    pool: Any
    shared: Any
    kept: Measurements
    watch: Watch
    go_on: Callable[[], bool] = lambda: True

    def model(
        self, subject: Subject, suites: Sequence[Suite], settings: Sequence[SuiteSettings]
    ) -> dict[str, Progress]:
        """All suites on one model; what is known already is not measured again.

        Args:
            subject: The model.
            suites: What is measured.
            settings: As the recipe has them, in the same order.

        Raises:
            RayAbliterateError: a chunk can't be measured; those before it are kept.
        """
        for suite, setting in zip(suites, settings, strict=True):
            self.suite(subject, suite, setting)
        return {suite.name: self.kept.of(subject.name, suite.name) for suite in suites}

    def suite(self, subject: Subject, suite: Suite, setting: SuiteSettings) -> None:
        """One of them."""
        known = self.kept.of(subject.name, suite.name)
        if known.whole or (known.chunks and settled(suite, setting, known.chunks)):
            return
        with self.watch.stage(f"{suite.name}, {subject.name}"):
            self._chunks(subject, suite, setting, known)

    def _chunks(
        self, subject: Subject, suite: Suite, setting: SuiteSettings, known: Progress
    ) -> None:
        held = {chunk.chunk: chunk for chunk in known.chunks}
        listed: list[str] = []

        def missing() -> Iterator[Chunk]:
            for chunk in suite.chunks():
                listed.append(chunk.id)
                own = held.get(chunk.id)
                if own is None or own.fingerprint != chunk.fingerprint:
                    yield chunk

        travelling = self.pool.put(suite)
        calls = ((travelling, chunk, subject.plan, self.shared) for chunk in missing())
        done, most_out = len(held), AHEAD * max(self.pool.replicas, 1)
        for result in self.pool.map("measure", calls, most_out, self.go_on):
            held[result.chunk] = result
            self.kept.add(subject.name, result)
            done += 1
            self.watch.step(done, max(len(listed), done))
            if settled(suite, setting, list(held.values())):
                return
        if self.go_on():
            self.kept.close(subject.name, suite.name, len(listed))


def settled(suite: Suite, setting: SuiteSettings, chunks: Sequence[SuiteChunk]) -> bool:
    """Whether the interval of the main score is on one side of the recipe's limits."""
    least, most = getattr(setting, "at_least", None), getattr(setting, "at_most", None)
    if least is None and most is None:
        return False
    score = suite.summary(chunks)[0]
    return all(limit is None or score.low > limit or score.high < limit for limit in (least, most))


def measure_trials(
    directory: RunDirectory,
    trials: Sequence[Trial],
    settings: Sequence[SuiteSettings],
    base: Path,
    pool: Any,
    shared: Any,
    watch: Watch,
) -> None:
    """All suites on the base model, then on each trial."""
    suites, kept = build(settings, base), directory.measurements(settings)
    directory.note(suites=[setting.model_dump(mode="json") for setting in settings])
    measurer = Measurer(pool, shared, kept, watch)
    for subject in (BASE_MODEL, *map(Subject.of, trials)):
        measurer.model(subject, suites, settings)


def chosen_suites(
    settings: Sequence[SuiteSettings], names: Sequence[str]
) -> tuple[SuiteSettings, ...]:
    """The suites of these names, or all.

    Raises:
        RecipeError: there is none, or none of a name.
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
