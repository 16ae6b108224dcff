"""Suites over a pool of replicas: what is measured of finished trials, chunk by chunk.

A chunk may be measured by anybody, and again. A few more than there are replicas are out at once,
so nothing holds a whole data set; a replica that dies costs the chunk it had. Each result is on the
disk before the next is asked for, so a stopped measurement goes on where it was.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray_abliterate.errors import RecipeError
from ray_abliterate.frontier import Frontier, Trial
from ray_abliterate.measurements import Measurements, Progress, label
from ray_abliterate.plan import Plan
from ray_abliterate.progress import Watch
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.suites import Chunk, Suite, SuiteChunk, build

AHEAD = 2
"""Chunks that are out for each replica: one is measured, one waits."""


def measure_model(
    pool: Any,
    suites: Sequence[Suite],
    settings: Sequence[SuiteSettings],
    plan: Plan,
    shared: Any,
    trial: int | None,
    kept: Measurements,
    watch: Watch,
) -> dict[str, Progress]:
    """All suites on one model; what is known already is not measured again.

    Args:
        pool: The replicas.
        suites: What is measured.
        settings: As the recipe has them, in the same order.
        plan: Makes the model; `Plan.nothing()` is the base model.
        shared: Reference to the run's setup.
        trial: Number of the plan's trial; None for the base model.
        kept: Takes the results, and has those of before.
        watch: Is told how far it is.

    Raises:
        RayAbliterateError: a chunk can't be measured; those before it are kept.
    """
    found: dict[str, Progress] = {}
    for suite, setting in zip(suites, settings, strict=True):
        known = kept.of(label(trial), suite.name)
        if not known.whole:
            with watch.stage(f"{suite.name}, {label(trial)}"):
                _measure(pool, suite, setting, plan, shared, trial, known, kept, watch)
        found[suite.name] = kept.of(label(trial), suite.name)
    return found


def _measure(
    pool: Any,
    suite: Suite,
    setting: SuiteSettings,
    plan: Plan,
    shared: Any,
    trial: int | None,
    known: Progress,
    kept: Measurements,
    watch: Watch,
) -> None:
    held = {chunk.chunk: chunk for chunk in known.chunks}
    if held and settled(suite, setting, known.chunks):
        return
    listed: list[str] = []

    def missing() -> Iterator[Chunk]:
        for chunk in suite.chunks():
            listed.append(chunk.id)
            own = held.get(chunk.id)
            if own is None or own.fingerprint != chunk.fingerprint:
                yield chunk

    travelling = pool.put(suite)
    calls = ((travelling, chunk, plan, shared) for chunk in missing())
    done = len(held)
    for result in pool.map("measure", calls, AHEAD * max(pool.replicas, 1)):
        held[result.chunk] = result
        kept.add(label(trial), result)
        done += 1
        watch.step(done, max(len(listed), done))
        if settled(suite, setting, list(held.values())):
            return
    kept.close(label(trial), suite.name, len(listed))


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
    models = [(None, Plan.nothing()), *((trial.number, trial.plan) for trial in trials)]
    for number, plan in models:
        measure_model(pool, suites, settings, plan, shared, number, kept, watch)


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


def validate(directory: RunDirectory, base: Path, pool: Any, shared: Any, watch: Watch) -> None:
    """The recipe's suites on the frontier, once the search has ended."""
    settings = directory.recipe.suites
    if settings:
        members = Frontier.of(directory.trials()).members
        measure_trials(directory, members, settings, base, pool, shared, watch)
