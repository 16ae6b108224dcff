"""The whole story: recipe → residuals → directions → baseline → search → frontier.

Everything is left in the run directory as it comes; a run that was stopped goes on from there.
"""

from contextlib import ExitStack
from pathlib import Path

from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.residual_shards import ResidualShards
from ray_abliterate.directions import layer_separation
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.initial_points import try_layers
from ray_abliterate.pipeline.progress import Progress, SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import start_replicas
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.pipeline.search_stage import search
from ray_abliterate.pipeline.validation import validate_after_search, validate_during_search
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.space import SearchSpace


def run(
    recipe: Recipe,
    directory: RunDirectory,
    base: Path,
    progress: Progress | None = None,
    profile: bool = False,
) -> Frontier:
    """Run a recipe, or go on with a run that was stopped, and return the frontier.

    Args:
        recipe: What to do.
        directory: Where everything goes; holds this recipe.
        base: The recipe's folder, for relative paths.
        progress: Display of stages, steps and trials; none if unset.
        profile: Profile one trial before the search.

    Raises:
        RayAbliterateError: something that the user can mend; says what. What has been computed
            stays in the directory.
    """
    progress = progress or SilentProgress()
    with ExitStack() as stack:
        stack.enter_context(directory.locked())
        record = EventRecorder(directory, progress)
        stack.enter_context(record.writer)
        sets = load_prompts(recipe, directory, base, progress)
        starting = start_replicas(recipe, directory, base, sets.scored, record, progress)
        context = stack.enter_context(starting)
        setup, shards = find_directions(context, sets)
        shared_setup = context.pool.put(setup)
        baseline = measure_baseline(context, setup, shared_setup, shards)
        if not directory.trials():
            try_layers(context, sets.scored, setup, shards)
        if profile:
            profile_trial(context, shared_setup, baseline)
        with validate_during_search(context, shared_setup) as on_frontier:
            search(context, shared_setup, baseline, on_frontier)
        if len(directory.trials()) >= recipe.search.trials:
            validate_after_search(context, shared_setup)
    return Frontier.of(directory.trials())


def measure_baseline(
    context: RunContext,
    setup: TrialSetup,
    shared_setup: Reference[TrialSetup],
    shards: ResidualShards | None,
) -> Baseline:
    """Score the unedited model, and measure how well each layer's direction separates the sets.

    A baseline that the run directory holds is returned as it is.

    Args:
        context: The run.
        setup: Holds the directions.
        shared_setup: Reference to the setup in the object store.
        shards: The residuals; None if they were not needed because the baseline is known.
    """
    directory = context.directory
    stored = directory.baseline()
    if stored is not None or shards is None:
        assert stored is not None
        return stored
    with context.progress.stage("baseline"):
        evaluation = context.pool.call(ReplicaApi.evaluate, Plan.nothing(), shared_setup.argument)
    separation = shards.separation(setup.directions, context.recipe.direction)
    best = layer_separation.best_layer(separation)
    baseline = Baseline(evaluation.scorecard, tuple(separation), best)
    directory.save_baseline(baseline)
    for score in evaluation.scorecard.scores:
        context.progress.note(
            f"base model: {score.name} {score.value:.4g} [{score.low:.3g}, {score.high:.3g}]"
        )
    return baseline


def profile_trial(
    context: RunContext, shared_setup: Reference[TrialSetup], baseline: Baseline
) -> None:
    """Measure where the time of a trial goes: a table, and a trace in the run directory."""
    recipe, progress = context.recipe, context.progress
    space = SearchSpace.of(context.pool.facts.shape, recipe.search.space, recipe.edit.norm)
    plan = space.plan(space.initial_points(float(baseline.best_layer))[1])
    with progress.stage("profile"):
        profile = context.pool.call(ReplicaApi.profile_trial, plan, shared_setup.argument)
    context.directory.save_profile(profile.table(), profile.trace)
    for line in profile.table().splitlines():
        progress.note(line)
    trace = context.directory.path / "profile" / "trial.json.gz"
    progress.note(f"trace: {trace} (open in ui.perfetto.dev)")
