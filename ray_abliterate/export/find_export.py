"""Finds the export that a run holds of a trial, and writes it if there is none.

What is uploaded and what is served both come from here. Loads nothing heavy before it writes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ray_abliterate.errors import ExportError, PushError, TrialNotFound

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.progress import Progress
    from ray_abliterate.search.frontier import Trial

CONFIGS = ("config.json", "adapter_config.json")
EXPORTS, SERVING = "exports", "serving"
"""Folders of a run: verified exports, and models that were written only to be served."""


def is_export(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter, rather than a run."""
    return any((folder / name).is_file() for name in CONFIGS)


def trial_folder(directory: "RunDirectory", trial: "Trial", kind: str) -> Path:
    """Return where a run holds its export of a trial, under `EXPORTS` or `SERVING`."""
    return directory.path / kind / f"trial-{trial.number}"


def is_of_trial(folder: Path, trial: "Trial") -> bool:
    """Return whether the export in a folder was made by the trial's plan.

    Raises:
        ReproductionError: the folder holds no bundle, or a damaged one.
    """
    from ray_abliterate.export.bundle import read_bundle

    plan: object = json.loads(trial.plan.to_json())
    return read_bundle(folder)[0].plan == plan


def export_once(
    directory: "RunDirectory",
    trial: "Trial",
    folder: Path,
    progress: "Progress",
    verify: bool,
    originals: str | None = None,
) -> Path:
    """Return the export of a trial in `folder`, writing it if the folder is not there.

    Args:
        directory: The run.
        trial: The trial.
        folder: Where the run holds it; see `trial_folder`.
        progress: Is notified of what happens.
        verify: Whether an export that is written now is verified.
        originals: `--originals`, after a search on a quantized checkpoint.

    Raises:
        ExportError: the folder holds another export, or the trial cannot be exported.
        ReproductionError: what the folder holds is damaged.
    """
    from ray_abliterate.export.bundle import read_bundle
    from ray_abliterate.export.export import export_trial
    from ray_abliterate.export.original_model import public_name_of

    if not folder.exists():
        return export_trial(directory, trial, folder, progress, verify, originals=originals)
    if not is_of_trial(folder, trial):
        raise ExportError(
            f"{folder} is not of trial {trial.number} of {directory.path}; remove it first."
        )
    base = read_bundle(folder)[0].base.called
    if originals is not None and base != public_name_of(originals).called:
        raise ExportError(
            f"{folder} exists already and was made of {base}, not of --originals {originals}; "
            "remove it first."
        )
    progress.note(f"using the export in {folder}")
    return folder


def find_or_export(
    place: Path,
    number: int | None,
    progress: "Progress",
    unverified: bool,
    originals: str | None = None,
) -> Path:
    """Return the export to upload: the folder itself, or that of a run's trial.

    Args:
        place: An export, or a run.
        number: The trial; the frontier's knee if None.
        progress: Is notified of what happens.
        unverified: Whether an export that is written now goes without verification.
        originals: `--originals`, after a search on a quantized checkpoint.

    Raises:
        PushError: a trial or originals are named, but the folder is an export.
        TrialNotFound: there is no such trial.
        ExportError: the trial cannot be exported, or its folder holds another export.
    """
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.search.frontier import Frontier

    if is_export(place):
        for option, value in (("--trial", number), ("--originals", originals)):
            if value is not None:
                raise PushError(
                    f"{option} {value}: {place} is an export, not a run; leave {option} out."
                )
        return place
    directory = RunDirectory.open(place)
    if number is None:
        frontier = Frontier.of(directory.trials())
        if not frontier:
            raise TrialNotFound(f"{place} has no finished trial to upload")
        number = frontier.knee.number
        progress.note(f"no --trial given: using trial {number}, the frontier's knee")
    trial = directory.trial(number)
    folder = trial_folder(directory, trial, EXPORTS)
    return export_once(directory, trial, folder, progress, not unverified, originals)
