"""The export that is to leave this machine: one that was written before, or is written now."""

import json
from pathlib import Path

from ray_abliterate.errors import PushError, TrialNotFound
from ray_abliterate.export.bundle import read_bundle
from ray_abliterate.export.export import export_trial
from ray_abliterate.export.original_model import published
from ray_abliterate.export.push import CONFIGS
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.frontier import Frontier


def exported(
    place: Path, trial: int | None, progress: Progress, unverified: bool, originals: str | None = None
) -> Path:
    """The export to upload: the folder itself, or that of a run's trial, written if need be.

    Raises:
        PushError: the folder where the trial's export goes holds something else.
        RayAbliterateError: there is no such trial, or it can't be exported.
    """
    if any((place / name).is_file() for name in CONFIGS):
        for option, value in (("--trial", trial), ("--originals", originals)):
            if value is not None:
                raise PushError(
                    f"{option} {value}: {place} is an export, not a run; leave {option} out."
                )
        return place
    directory = RunDirectory.open(place)
    if trial is None:
        frontier = Frontier.of(directory.trials())
        if not frontier:
            raise TrialNotFound(f"{place} has no finished trial to upload")
        trial = frontier.knee.number
        progress.note(f"no --trial given: taking trial {trial}, the frontier's knee")
    chosen = directory.trial(trial)
    folder = place / "exports" / f"trial-{trial}"
    if not folder.exists():
        verify = not unverified
        return export_trial(directory, chosen, folder, progress, verify, originals=originals)
    bundle, _, file = read_bundle(folder)
    if bundle.plan != json.loads(chosen.plan.to_json()):
        raise PushError(f"{file} is not of trial {trial} of {place}; remove {folder} first.")
    if originals is not None and bundle.base.called != published(originals).called:
        raise PushError(
            f"{folder} is there, and was made of {bundle.base.called}, not of --originals "
            f"{originals}; remove it first."
        )
    progress.note(f"taking the export in {folder}")
    return folder
