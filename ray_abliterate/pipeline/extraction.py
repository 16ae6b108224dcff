"""Residuals of a recipe's prompts without a search: what `directions RECIPE` needs Ray for."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.pipeline.run import find_directions, load_prompts, replicas, try_layers
from ray_abliterate.pipeline.search_stage import Record
from ray_abliterate.recipe import Recipe


def extract(
    recipe: Recipe, recipe_text: str, base: Path, folder: Path, watch: Watch
) -> RunDirectory:
    """A run directory that holds the residuals of a recipe's prompts; a search can go on from it.

    Residuals that are there already, of the same model and prompts, are taken as they are.

    Raises:
        RunDirectoryError: the folder holds a run of another model or other prompts.
    """
    if RunDirectory.is_one(folder):
        directory = RunDirectory.open(folder)
        own = directory.recipe
        read = ("residual_dtype", "skip_common_prefix", "positions", "per_component")
        direction = own.direction.model_copy(update={k: getattr(recipe.direction, k) for k in read})
        same: dict[str, Any] = {
            "model": recipe.model, "prompts": recipe.prompts, "direction": direction,
        }  # fmt: skip
        if recipe.prompts.filter_by_behaviour:  # by a scorer
            same["scorers"] = recipe.scorers
        directory.refuse_changed(own.model_copy(update=same))
        tried = recipe.search.seeds != "log-odds" or directory.selection() is not None
        if directory.environment.get("residuals") and tried:
            return directory
    else:
        directory = RunDirectory.create(folder, recipe, recipe_text)
    kept = recipe.run.model_copy(update={"save_residuals": True})
    recipe = recipe.model_copy(update={"run": kept})
    with ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(directory.locked())
        record = Record(directory, watch)
        open_until_the_end.enter_context(record.writer)
        sets = load_prompts(recipe, directory, base, watch)
        starting = replicas(recipe, directory, base, {}, record, watch)
        pool, _ = open_until_the_end.enter_context(starting)
        setup, shards = find_directions(recipe, directory, pool, sets, watch)
        try_layers(recipe, directory, pool, sets, setup, shards, watch)
    return directory
