"""Suites on the base model and trials of a finished run, on request."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ray_abliterate.cluster.connection import connect
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.frontier import Trial
from ray_abliterate.measuring import measure_trials
from ray_abliterate.progress import Watch
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.replica import Setup
from ray_abliterate.run import describe, model_source, warn
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.searching import Record


def evaluate_run(
    directory: RunDirectory,
    trials: Sequence[Trial],
    settings: Sequence[SuiteSettings],
    base: Path,
    watch: Watch,
) -> None:
    """Measure the base model and trials of a run, on all replicas; what is known is kept.

    Args:
        directory: The run's.
        trials: Beside the base model.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        watch: Is told how far it is.

    Raises:
        RunDirectoryError: the run has no directions yet.
        RayAbliterateError: a suite can't be measured; what was measured before is kept.
    """
    recipe = directory.recipe
    directions = directory.directions()
    if directions is None:
        raise RunDirectoryError(
            f"{directory.path} has no directions yet.\n"
            f"  Go on with:  ray-abliterate resume {directory.path}"
        )
    prefix = tuple(directory.environment["response_prefix"])
    setup = Setup(directions, prefix, directory.tuning())
    with ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(directory.locked())
        record = Record(directory, watch)
        open_until_the_end.enter_context(record.writer)
        with watch.stage("model"):
            source = model_source(recipe.model.name, partial(warn, directory, watch))
        with watch.stage("replicas"):
            dashboard = connect(recipe.run.dashboard, (str(directory.base.resolve()),))
            starting = ReplicaPool.start(directory.pinned(recipe), source, {}, record.event)
            pool = open_until_the_end.enter_context(starting)
        describe(recipe, directory, pool, dashboard, watch)
        measure_trials(directory, trials, settings, base, pool, pool.put(setup), watch)
