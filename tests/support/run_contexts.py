"""A `RunContext` around any pool, such as one in this process."""

from pathlib import Path
from typing import Any

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.progress import Progress, SilentProgress
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.recipe import Recipe


def run_context(
    directory: RunDirectory,
    pool: Any,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    base: Path | None = None,
) -> RunContext:
    """Return a context; without arguments, of the run's own recipe and with a silent display."""
    display = progress or SilentProgress()
    record = EventRecorder(directory, display)
    return RunContext(
        recipe or directory.read_recipe(),
        directory,
        base or directory.read_base(),
        pool,
        record,
        display,
    )
