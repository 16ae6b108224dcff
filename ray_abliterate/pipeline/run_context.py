"""What every stage of a run works with, in one value."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import Recipe

if TYPE_CHECKING:
    from ray_abliterate.cluster.pool import ReplicaPool


@dataclass(frozen=True)
class RunContext:
    """A run that has its replicas; handed to each stage in turn.

    Attributes:
        recipe: What to do. May differ from the directory's own in what a single stage changes.
        directory: Where results go.
        base: Folder that the recipe's relative paths start from.
        pool: The run's replicas.
        record: Writes events, trials and warnings.
        progress: Display of stages, steps and notes.
        source: Folder or Hub name that the model was loaded from.
    """

    recipe: Recipe
    directory: RunDirectory
    base: Path
    pool: "ReplicaPool"
    record: EventRecorder
    progress: Progress
    source: str = ""
