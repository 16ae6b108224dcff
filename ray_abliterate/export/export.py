"""Writes the model that a trial's plan makes as a folder, and verifies what was written.

Either the whole model, a copy of the checkpoint with the writers edited, or an adapter for it. What
was written is reloaded and scored again before it gets its name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ExportError, ModelError, ScoreError
from ray_abliterate.export.adapter import AdapterEdit, Base, write_adapter
from ray_abliterate.export.bundle import write_bundle
from ray_abliterate.export.checkpoint import DTYPES, Checkpoint
from ray_abliterate.export.checkpoint_writers import StoredWriter, stored_writers
from ray_abliterate.export.file_layout import FileLayout, headers_fingerprint, layout_of, parse_size
from ray_abliterate.export.merged import EditedTensors, write_merged
from ray_abliterate.export.model_card import model_card
from ray_abliterate.export.original_model import find_original
from ray_abliterate.export.public_names import Published
from ray_abliterate.export.scratch import finished_bytes, give_name, scratch, scratch_name
from ray_abliterate.export.target import check_target, unverified_name
from ray_abliterate.export.verification import Verification, Verifier
from ray_abliterate.model.architecture import WriterRow, hidden_size
from ray_abliterate.model.loading import device_for
from ray_abliterate.model.skeleton import skeleton_of_folder
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.report_exports import note_export
from ray_abliterate.pipeline.rescored import note_rescored
from ray_abliterate.pipeline.run import load_prompts
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.frontier import Frontier, Trial

Kind = Literal["merged", "adapter"]


@dataclass(frozen=True)
class ExportForm:
    """What is written.

    Attributes:
        kind: The whole model, or a PEFT adapter for the base model.
        shard_bytes: Size of the weight files; the original's own files if None.
        adapter_error: What an adapter may lack of an edit, relative to the edit, by writer.
    """

    kind: Kind = "merged"
    shard_bytes: int | None = None
    adapter_error: float = 0.01

    @classmethod
    def of(cls, kind: str, shard_size: str | None, adapter_error: float) -> "ExportForm":
        """The form that the command line asks for.

        Raises:
            ExportError: a value is none of those that are taken.
        """
        if kind not in get_args(Kind):
            raise ExportError(f"--as {kind!r}: expected one of {', '.join(get_args(Kind))}")
        if kind == "adapter" and shard_size is not None:
            raise ExportError("--shard-size is for whole models; an adapter is one small file")
        if not 0 <= adapter_error < 1:
            raise ExportError(f"--adapter-error {adapter_error} is not a share between 0 and 1")
        shard_bytes = None if shard_size is None else parse_size(shard_size)
        return cls(cast(Kind, kind), shard_bytes, adapter_error)


MERGED = ExportForm()


def export_trial(
    directory: RunDirectory,
    trial: Trial,
    to: Path,
    progress: Progress,
    verify: bool = True,
    form: ExportForm = MERGED,
    originals: str | None = None,
) -> Path:
    """Write the edited model into the folder `to`, which appears when it is complete and verified.

    An export that was interrupted is taken up again by the next call that asks for the same.

    Args:
        directory: The run.
        trial: Whose plan is applied.
        to: Folder to write.
        progress: Receives what happens.
        verify: Reload what was written, and score it.
        form: What is written.
        originals: Folder or Hub name of what a quantized checkpoint was made of, after a search on
            one.

    Raises:
        ExportError: it cannot be written, or the written files don't score as the trial did; these
            are kept under `<to>.unverified`. Or it is to be verified, and the trial is bounded.
    """
    to = to.absolute()
    if verify:
        refuse_bounded(directory, trial, to, originals)
    recipe = directory.read_recipe()
    directions = directory.directions()
    if directions is None:
        raise ExportError(f"{directory.path} has no directions; start a new run of the recipe")
    original = find_original(directory, originals, progress)
    source = Checkpoint.open(original.folder)
    layout = layout_of(source, form.shard_bytes)
    identity = _identity(directory, trial, directions, source, form)
    left = _wanted(source, layout, form) - finished_bytes(to, identity)
    check_target(to, source.folder, left)
    scored = load_prompts(recipe, directory, directory.read_base(), progress).scored if verify else {}
    with _told(to, progress), scratch(to, identity) as work, _threads(directory):
        module, targets = find_targets(recipe, source, directions, progress)
        adapted: tuple[str, ...] | None = None
        if form.kind == "merged":
            edited = EditedTensors(targets, trial.plan, directions)
            write_merged(source, layout, edited, work, progress)
            count, stored = len(layout.files), str(_dtype(targets)).removeprefix("torch.")
            progress.note(
                f"weights: {layout.bytes / 1e9:.2f} GB in {count} files, writers in {stored}"
            )
        else:
            edit = AdapterEdit(module, targets, trial.plan, directions)
            write_adapter(edit, _base(original.base), form.adapter_error, work.folder, progress)
            adapted = edit.stored
        card = model_card(directory, trial, original, form.kind)
        _write_text(work.folder / "README.md", card)
        write_bundle(directory, trial, original, work.folder, adapted)
        if verify:
            check = Verifier(directory, trial, scored, source.folder, _dtype(targets), progress)
            found = _verified(check, work.folder, to)
            _tell(found, progress)
            note_rescored(directory, trial, found)
        if to.exists():
            to.rmdir()
        give_name(work.folder, to)
    progress.note(f"trial {trial.number} written to {to}")
    _list(directory, to, progress)
    return to


def _list(directory: RunDirectory, to: Path, progress: Progress) -> None:
    """Have the run's report list an export, if it may be."""
    try:
        note_export(directory, to)
    except OSError as error:
        progress.note(f"the run's report won't list it: {directory.path} can't be written ({error})")


def find_targets(
    recipe: Recipe, source: Checkpoint, directions: Directions, progress: Progress
) -> tuple[nn.Module, list[StoredWriter]]:
    """The model without its weights, and the writers in the checkpoint's files.

    Raises:
        ExportError: the checkpoint does not hold the writers as the model has them, or the model
            is not the one of the run.
    """
    with progress.stage("model"):
        module = skeleton_of_folder(source.folder, recipe.model)
        rows = tuple(WriterRow(**row.model_dump()) for row in recipe.model.writers)
        spread = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device_for(recipe.model).replace("auto", spread))
        targets = stored_writers(module, source, rows, device)
    shape = (1 + max(target.writer.layer for target in targets), hidden_size(module))
    if shape[1] != directions.vectors.shape[1] or shape[0] > directions.layers:
        raise ExportError(
            f"{source.folder} has {shape[0]} layers of width {shape[1]}, the run's directions are "
            f"for {directions.layers} of width {directions.vectors.shape[1]}: another model"
        )
    return module, targets


def _dtype(targets: list[StoredWriter]) -> torch.dtype:
    """The type that the writers are stored in, in which the edit is rounded."""
    target = targets[0]
    return DTYPES[target.source.tensors[target.forms[0].tensors[0]].dtype]


def _base(model: Published) -> Base:
    """What an adapter is for: never a path of this machine."""
    return Base(model.called, model.revision)


def _identity(
    directory: RunDirectory,
    trial: Trial,
    directions: Directions,
    source: Checkpoint,
    form: ExportForm,
) -> dict[str, Any]:
    """What tells an interrupted export from another one."""
    return {
        "plan": trial.plan.to_json(),
        "directions": hashlib.sha256(directions.bits()).hexdigest(),
        "rank": directions.rank,
        "source": str(source.folder),
        "files": headers_fingerprint(source),
        "form": asdict(form),
        "device": directory.read_environment()["model"]["device"],
        "torch": version("torch"),
    }


# Before anything is loaded


def refuse_bounded(
    directory: RunDirectory, trial: Trial, to: Path, originals: str | None = None
) -> None:
    """Refuse a trial whose scores are bounds: there is nothing to verify the written files by.

    Raises:
        ExportError: it is one; names the trial that is better.
    """
    if not trial.pruned:
        return
    lines = [
        f"trial {trial.number} was stopped early: its scores are bounds, by which no files can be "
        "verified."
    ]
    better = Frontier.of(directory.trials()).better_than(trial)
    if better is not None:
        command = f"ray-abliterate export {directory.path} --trial {better.number} --to {to}"
        command += f" --originals {originals}" if originals else ""
        lines.append(f"Export trial {better.number}, which is better whatever came:\n    {command}")
    lines.append(f"To write trial {trial.number} unverified, add --no-verify.")
    raise ExportError("\n  ".join(lines))


def _wanted(source: Checkpoint, layout: FileLayout, form: ExportForm) -> int:
    """Bytes that are written."""
    return source.companion_bytes + layout.bytes if form.kind == "merged" else 0


# When it is not the trial


def _verified(check: Verifier, folder: Path, to: Path) -> Verification:
    """Score what was written, and note the scores beside it.

    Raises:
        ExportError: they are not the trial's; the folder has another name then.
    """
    try:
        found = check.verify(folder)
    except (ModelError, ScoreError) as error:
        raise _unverified(folder, to, [f"  {error}"]) from error
    _write_text(folder / "verification.json", json.dumps(asdict(found), indent=2) + "\n")
    if found.failures:
        raise _unverified(folder, to, found.failures)
    return found


def _unverified(folder: Path, to: Path, lines: list[str]) -> ExportError:
    """Keep the folder under another name, and say why."""
    give_name(folder, unverified_name(to))
    return ExportError(
        "the written files do not score as the trial did:\n"
        + "\n".join(lines)
        + f"\n  They are kept in {unverified_name(to)} for a look; don't use them. If the base "
        "model's files\n  changed since the run, start a new run; otherwise please report this."
    )


def _tell(found: Verification, progress: Progress) -> None:
    if found.quantization:
        progress.note("verified: reloaded from disk, the scores are the plan's on the originals")
        for score in found.scores:
            progress.note(
                f"  {score.name}: {score.quantized:.4g} on {found.quantization} in the search, "
                f"{score.reloaded:.4g} in full precision"
            )
    else:
        progress.note("verified: reloaded from disk, the scores are the trial's")
        for score in found.scores:
            progress.note(
                f"  {score.name}: {score.trial:.4g} in the trial, {score.reloaded:.4g} reloaded"
            )
    for reason in found.reasons:
        progress.note(f"  compared with a tolerance, because {reason}")


# Files


@contextmanager
def _told(to: Path, progress: Progress) -> Iterator[None]:
    """Say where the files are that an interrupted export finished."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"the export to {to} stopped: {error.strerror or error}.\n"
            "  If the disk is full, free some space. The same command goes on from there."
        ) from error
    except BaseException:
        if scratch_name(to).exists():
            progress.note(
                f"what is finished is kept in {scratch_name(to)}: the same command goes on from "
                "there; remove it if you don't want that"
            )
        raise


@contextmanager
def _threads(directory: RunDirectory) -> Iterator[None]:
    """The search's number of CPU threads: another one sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(directory.read_environment()["replicas"]["threads"] or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.chmod(path, 0o644)
