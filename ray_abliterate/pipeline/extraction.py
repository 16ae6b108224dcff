"""Residuals and directions of a recipe's prompts: the first half of a run, or a run of its own."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.residual_shards import ExtractionSettings, ResidualShards
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.initial_points import try_layers
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.prompt_filter import BaseModelVerdicts, filter_by_behaviour
from ray_abliterate.pipeline.prompt_sets import PromptSets, load_prompts
from ray_abliterate.pipeline.replicas import start_replicas
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup

PREFIX_PROMPTS = 16
"""Prompts of each set whose answers are compared to find the response prefix."""


def extract(
    recipe: Recipe, recipe_text: str, base: Path, folder: Path, progress: Progress
) -> RunDirectory:
    """Return a run directory that holds the residuals of a recipe's prompts, without a search.

    A search can go on from it. Residuals that are there already, of the same model and prompts,
    are taken as they are.

    Args:
        recipe: Names the model and the prompts.
        recipe_text: The recipe's file, kept in a new directory.
        base: The recipe's folder, for relative paths.
        folder: The run directory, which is made if it isn't there.
        progress: Display of stages, steps and notes.

    Raises:
        RecipeChanged: the folder holds a run of another model or other prompts.
        RunDirectoryError: the folder cannot be written, or is in use.
    """
    if RunDirectory.holds_run(folder):
        directory = RunDirectory.open(folder)
        own = directory.read_recipe()
        # Only these fields decide what residuals are; method and search may differ.
        read = ("residual_dtype", "skip_common_prefix", "positions", "per_component")
        direction = own.direction.model_copy(update={k: getattr(recipe.direction, k) for k in read})
        same: dict[str, Any] = {
            "model": recipe.model, "prompts": recipe.prompts, "direction": direction,
        }  # fmt: skip
        if recipe.prompts.filter_by_behaviour:  # a scorer decides which prompts stay
            same["scorers"] = recipe.scorers
        directory.refuse_changed(own.model_copy(update=same))
        tried = recipe.search.seeds != "log-odds" or directory.selection() is not None
        if directory.read_environment().get("residuals") and tried:
            return directory
    else:
        directory = RunDirectory.create(folder, recipe, recipe_text)
    saving = recipe.run.model_copy(update={"save_residuals": True})
    recipe = recipe.model_copy(update={"run": saving})
    with ExitStack() as stack:
        stack.enter_context(directory.locked())
        record = EventRecorder(directory, progress)
        stack.enter_context(record.writer)
        sets = load_prompts(recipe, directory, base, progress)
        starting = start_replicas(recipe, directory, base, {}, record, progress)
        context = stack.enter_context(starting)
        setup, shards = find_directions(context, sets)
        try_layers(context, sets.scored, setup, shards)
    return directory


def find_directions(
    context: RunContext, sets: PromptSets
) -> tuple[TrialSetup, ResidualShards | None]:
    """Extract residuals and compute the directions, unless the run directory has them.

    Returns:
        What all trials share, and the residuals; None in their place if the directory already
        holds both directions and baseline, so that nobody needs them.

    Raises:
        PromptSourceError: filtering leaves too few prompts of a set.
        NoDirection: the sets don't differ in any layer.
    """
    recipe, directory, pool, progress = (
        context.recipe, context.directory, context.pool, context.progress,
    )  # fmt: skip
    stored, tuning = directory.directions(), directory.tuning()
    if stored is not None and directory.baseline() is not None:
        prefix = tuple(directory.read_environment()["response_prefix"])
        return TrialSetup(stored, prefix, tuning), None
    if tuning is None:
        with progress.stage("batch sizes"):
            tuning = pool.call(ReplicaApi.tune, pool.layout.replicas)
        directory.record_facts(tuning=asdict(tuning))
    prefix = response_prefix(context, sets)
    if recipe.prompts.filter_by_behaviour:
        verdicts = BaseModelVerdicts(context, prefix, tuning)
        behaviour, neutral = filter_by_behaviour(context, (sets.behaviour, sets.neutral), verdicts)
        sets = replace(sets, behaviour=behaviour, neutral=neutral)
    extraction = ExtractionSettings.of(recipe, prefix, tuning)
    files = ShardFiles.of(recipe.run, directory.shards, context.record.warn)
    shards = ResidualShards(pool, files, extraction, sets.behaviour, sets.neutral)
    with progress.stage("residuals"):
        shards.extract(progress.step)
    directory.record_facts(residuals=shards.facts())
    with progress.stage("directions"):
        directions = shards.directions(recipe.direction)
    if statistics := directions.origin.get("statistics"):
        progress.note(f"directions: {recipe.direction.method}, {statistics}")
    if position := directions.origin.get("position"):
        progress.note(f"directions: token {position} of the prompts separates the sets best")
    directory.save_directions(directions)
    return TrialSetup(directions, prefix, tuning), shards


def response_prefix(context: RunContext, sets: PromptSets) -> tuple[int, ...]:
    """Return the token ids that all answers begin with, from the run directory or found now.

    A closed thinking block, for example. Residuals are read after it, and answers begin with it.
    """
    directory = context.directory
    stored = directory.read_environment().get("response_prefix")
    if stored is not None:
        return tuple(stored)
    prefix: tuple[int, ...] = ()
    if context.recipe.direction.skip_common_prefix:
        with context.progress.stage("common response prefix"):
            prompts = [
                *sets.behaviour.prompts[:PREFIX_PROMPTS],
                *sets.neutral.prompts[:PREFIX_PROMPTS],
            ]
            prefix = context.pool.call(ReplicaApi.find_response_prefix, prompts)
    directory.record_facts(response_prefix=list(prefix))
    return prefix
