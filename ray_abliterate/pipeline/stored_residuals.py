"""Residuals that a run has stored, read from its files one layer at a time.

Files are memory-mapped: only what a layer needs is read, and nothing but that layer is held.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy

from ray_abliterate.data.atomic_files import cache_root
from ray_abliterate.directions.residuals.shard import DamagedShard, LayerValues, ResidualShard
from ray_abliterate.directions.residuals.shard_files import ShardFolder
from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.pipeline.directory import RunDirectory

SETS = ("behaviour", "neutral")


class StoredSet:
    """The residuals of one prompt set, in shards that are files.

    Attributes:
        prompts: Number of prompts.
        layers: Number of blocks of the model.
    """

    def __init__(
        self, shards: Sequence[ResidualShard], first: int = 0, layers: int | None = None
    ) -> None:
        """Check that the shards hold each prompt once.

        Args:
            shards: All shards of the set, in the order of their prompts.
            first: Column of the first layer: shards may hold several token positions.
            layers: Number of blocks of the model; all columns if None.

        Raises:
            ValueError: they don't hold each prompt once.
        """
        ends = [0, *accumulate(shard.prompts for shard in shards)]
        if not shards or [shard.first for shard in shards] != ends[:-1]:
            spans = ", ".join(f"{shard.first} + {shard.prompts}" for shard in shards)
            raise ValueError(f"residual shards ({spans}) don't hold each prompt once")
        self._shards = tuple(shards)
        self.prompts = ends[-1]
        self._first = first
        self.layers = shards[0].layers if layers is None else layers

    def layer(self, index: int) -> LayerValues:
        """Return the residuals after one block, float32 `"prompt hidden"`, in the set's order."""
        parts = [shard.layer(self._first + index) for shard in self._shards]
        values: LayerValues = numpy.concatenate(parts).astype(numpy.float32, copy=False)
        return values


def stored_sets(directory: RunDirectory) -> tuple[StoredSet, StoredSet]:
    """Return both sets of a run, from its own folder or from the cache that runs share.

    Where residuals were read at several tokens, these are those at the token of the run's
    directions. Every file's checksum is compared first, which reads all of them once.

    Raises:
        RunDirectoryError: residuals were not extracted, not saved, or are damaged.
    """
    facts = directory.read_environment().get("residuals")
    if not facts:
        raise RunDirectoryError(
            f"{directory.path} has no residuals yet.\n"
            f"  Extract them with:  ray-abliterate resume {directory.path}"
        )
    try:
        behaviour, neutral = (_find_set(directory, name, facts[name]) for name in SETS)
    except (DamagedShard, OSError, ValueError) as error:
        raise RunDirectoryError(
            f"the residuals of {directory.path} can't be read: {error}\n"
            f"  {_extract_again(directory)}"
        ) from None
    return behaviour, neutral


def _find_set(directory: RunDirectory, name: str, facts: Mapping[str, Any]) -> StoredSet:
    key, count = str(facts["key"]), int(facts["shards"])
    for folder in (directory.shards, ShardFolder(cache_root() / "residuals" / key)):
        shards = list(folder.map_all(name, key, count))
        if len(shards) == count:
            layers = directory.read_environment()["model"]["layers"]
            directions = directory.directions()
            back = -1 - int(directions.origin.get("position", -1)) if directions else 0
            return StoredSet(shards, back * _columns(directory), layers)
    why = "" if directory.read_recipe().run.save_residuals else " (run.save_residuals = false)"
    raise RunDirectoryError(
        f"{directory.path} does not hold the residuals of {name!r}{why}, and the cache does not "
        f"either.\n  {_extract_again(directory)}"
    )


def _columns(directory: RunDirectory) -> int:
    """Return the columns of a token: layers of the stream, then those of each component, if any."""
    model = directory.read_environment()["model"]
    parts = len(model["components"]) if directory.read_recipe().direction.per_component else 0
    return int(model["layers"]) * (1 + parts)


def _extract_again(directory: RunDirectory) -> str:
    return (
        "Extract them again, into another folder:  "
        f"ray-abliterate directions RECIPE --to {directory.path}-directions"
    )
