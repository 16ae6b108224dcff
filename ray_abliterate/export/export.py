"""Writes the model that a trial's plan makes into a folder, and verifies what was written.

That is the whole model, a copy of the checkpoint with the writers edited, or an adapter for it. It
is reloaded and scored again before the folder gets its name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch

from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ExportError, ModelError, ScoreError
from ray_abliterate.export.adapter import AdapterBase, AdapterEdit, write_adapter
from ray_abliterate.export.bundle import write_bundle
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.checkpoint_writers import StoredModel, cpu_threads, stored_writers
from ray_abliterate.export.file_layout import choose_layout, file_stats, parse_size
from ray_abliterate.export.merged import EditedTensors, write_merged
from ray_abliterate.export.model_card import ExportKind, model_card
from ray_abliterate.export.original_model import find_original
from ray_abliterate.export.output_folder import (
    finished_bytes,
    open_partial,
    partial_path,
    refuse_unfit_target,
    rename_complete,
    unverified_path,
)
from ray_abliterate.export.verification import Verification, Verifier
from ray_abliterate.model.architecture import WriterRow, hidden_size
from ray_abliterate.model.loading import device_for
from ray_abliterate.model.skeleton import skeleton_of_folder
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.export_notes import note_export, note_full_precision
from ray_abliterate.pipeline.progress import Progress, SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.frontier import Frontier, Trial


@dataclass(frozen=True)
class ExportForm:
    """What is written.

    Attributes:
        kind: The whole model, or a PEFT adapter for the base model.
        shard_bytes: Size of the weight files; the original's own files if None.
        adapter_error: The most that an adapter may lack of a writer's edit, relative to the edit.
    """

    kind: ExportKind = "merged"
    shard_bytes: int | None = None
    adapter_error: float = 0.01

    @classmethod
    def of(cls, kind: str, shard_size: str | None, adapter_error: float) -> "ExportForm":
        """Return the form that the command line asks for.

        Args:
            kind: `--as`.
            shard_size: `--shard-size`, such as `5GB`.
            adapter_error: `--adapter-error`.

        Raises:
            ExportError: a value is not one of those that are taken.
        """
        if kind not in get_args(ExportKind):
            raise ExportError(f"--as {kind!r}: expected one of {', '.join(get_args(ExportKind))}")
        if kind == "adapter" and shard_size is not None:
            raise ExportError("--shard-size is for whole models; an adapter is one small file")
        if not 0 <= adapter_error < 1:
            raise ExportError(f"--adapter-error {adapter_error} must be at least 0 and below 1")
        shard_bytes = None if shard_size is None else parse_size(shard_size)
        return cls(cast(ExportKind, kind), shard_bytes, adapter_error)


MERGED = ExportForm()
SILENT = SilentProgress()


def export_trial(
    directory: RunDirectory,
    trial: Trial,
    to: Path,
    progress: Progress = SILENT,
    verify: bool = True,
    form: ExportForm = MERGED,
    originals: str | None = None,
) -> Path:
    """Write the edited model into the folder `to`, which appears when it is complete and verified.

    An export that was interrupted resumes with the next call that asks for the same. The last four
    parameters are the options of the command `export`; most calls give the first three.

    Args:
        directory: The run.
        trial: The trial whose plan is applied.
        to: The folder to write; it must not exist, or be empty.
        progress: Is notified of what happens.
        verify: Reload what was written, and score it.
        form: What is written.
        originals: After a search on a quantized checkpoint, the folder or Hub name of the model
            that it was made of.

    Returns:
        The folder, as an absolute path.

    Raises:
        ExportError: the export cannot be written; or the written files don't score as the trial did
            and now lie under `<to>.unverified`; or the trial was pruned, so that its scores cannot
            verify anything.
    """
    to = to.absolute()
    if verify:
        refuse_pruned(directory, trial, to, originals)
    recipe = directory.read_recipe()
    directions = directory.directions()
    if directions is None:
        raise ExportError(f"{directory.path} has no directions; start a new run of the recipe")
    original = find_original(directory, originals, progress)
    source = Checkpoint.open(original.folder)
    layout = choose_layout(source, form.shard_bytes)
    identity = _identity(directory, trial, directions, source, form)
    size = source.companion_bytes + layout.bytes if form.kind == "merged" else 0
    refuse_unfit_target(to, source.folder, size - finished_bytes(to, identity))
    scored = (
        load_prompts(recipe, directory, directory.read_base(), progress).scored if verify else {}
    )
    threads = directory.read_environment()["replicas"]["threads"] or torch.get_num_threads()
    with (
        _interruption_explained(to, progress),
        open_partial(to, identity) as partial,
        cpu_threads(threads),  # the search's
    ):
        model = open_stored_model(recipe, source, directions, progress)
        adapted: tuple[str, ...] | None = None
        if form.kind == "merged":
            edited = EditedTensors(model.writers, trial.plan, directions)
            write_merged(source, layout, edited, partial, progress)
            count, stored = len(layout.files), str(model.dtype).removeprefix("torch.")
            progress.note(
                f"weights: {layout.bytes / 1e9:.2f} GB in {count} files, writers in {stored}"
            )
        else:
            edits = AdapterEdit(model.module, model.writers, trial.plan, directions)
            base = AdapterBase(original.base.called, original.base.revision)
            write_adapter(edits, base, form.adapter_error, partial.folder, progress)
            adapted = edits.stored
        card = model_card(directory, trial, original, form.kind)
        _write_text(partial.folder / "README.md", card)
        write_bundle(directory, trial, original, partial.folder, adapted)
        if verify:
            verifier = Verifier(directory, trial, scored, source.folder, model.dtype, progress)
            _verify(verifier, partial.folder, to)
        if to.exists():
            to.rmdir()
        rename_complete(partial.folder, to)
    progress.note(f"trial {trial.number} written to {to}")
    _list_in_report(directory, to, progress)
    return to


def _list_in_report(directory: RunDirectory, to: Path, progress: Progress) -> None:
    """Record an export for the run's report; a run that cannot be written is no error."""
    try:
        note_export(directory, to)
    except OSError as error:
        progress.note(
            f"the run's report won't list this export: {directory.path} can't be written ({error})"
        )


def open_stored_model(
    recipe: Recipe, source: Checkpoint, directions: Directions, progress: Progress
) -> StoredModel:
    """Find the writers of a checkpoint's model in its files. Reads hardly any weights.

    Raises:
        ExportError: the checkpoint does not hold the writers as the model has them, or the model
            is not the one of the run.
    """
    with progress.stage("model"):
        module = skeleton_of_folder(source.folder, recipe.model)
        rows = tuple(WriterRow(**row.model_dump()) for row in recipe.model.writers)
        # one matrix at a time needs no spreading over devices, which "auto" stands for
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device_for(recipe.model).replace("auto", automatic))
        writers = stored_writers(module, source, rows, device)
    shape = (1 + max(writer.writer.layer for writer in writers), hidden_size(module))
    if shape[1] != directions.vectors.shape[1] or shape[0] > directions.layers:
        raise ExportError(
            f"{source.folder} is another model than the run's: it has {shape[0]} layers of width "
            f"{shape[1]}, the directions are for {directions.layers} layers of width "
            f"{directions.vectors.shape[1]}."
        )
    return StoredModel(source, module, writers)


def _identity(
    directory: RunDirectory,
    trial: Trial,
    directions: Directions,
    source: Checkpoint,
    form: ExportForm,
) -> dict[str, Any]:
    """Return what tells one export from another, so that only the same one resumes."""
    return {
        "plan": trial.plan.to_json(),
        "directions": hashlib.sha256(directions.bits()).hexdigest(),
        "rank": directions.rank,
        "source": str(source.folder),
        "files": file_stats(source),
        "form": asdict(form),
        "device": directory.read_environment()["model"]["device"],
        "torch": version("torch"),
    }


# Before anything is loaded


def refuse_pruned(
    directory: RunDirectory, trial: Trial, to: Path, originals: str | None = None
) -> None:
    """Make sure that a trial's scores are exact: bounds cannot verify the written files.

    Raises:
        ExportError: the trial was pruned; names one that is better.
    """
    if not trial.pruned:
        return
    lines = [
        f"trial {trial.number} was stopped early: its scores are bounds, which can verify no files."
    ]
    better = Frontier.of(directory.trials()).better_than(trial)
    if better is not None:
        command = f"ray-abliterate export {directory.path} --trial {better.number} --to {to}"
        command += f" --originals {originals}" if originals else ""
        lines.append(f"Export trial {better.number}, which is better in any case:\n    {command}")
    lines.append(f"To write trial {trial.number} unverified, add --no-verify.")
    raise ExportError("\n  ".join(lines))


# Verification


def _verify(verifier: Verifier, folder: Path, to: Path) -> None:
    """Score what was written, and record the scores in the folder, and for the run's report.

    Raises:
        ExportError: they are not the trial's; the folder has its unverified name then.
    """
    try:
        verification = verifier.verify(folder)
    except (ModelError, ScoreError) as error:
        raise _set_aside(folder, to, [f"  {error}"]) from error
    _write_text(folder / "verification.json", json.dumps(asdict(verification), indent=2) + "\n")
    if verification.failures:
        raise _set_aside(folder, to, verification.failures)
    _report_verification(verification, verifier.progress)
    if verification.quantization:
        scores = [(s.name, float(s.quantized or 0.0), s.reloaded) for s in verification.scores]
        note_full_precision(verifier.directory, verifier.trial, scores)


def _set_aside(folder: Path, to: Path, lines: list[str]) -> ExportError:
    """Give a folder its unverified name, and return the error that says why."""
    rename_complete(folder, unverified_path(to))
    return ExportError(
        "the written files do not score as the trial did:\n"
        + "\n".join(lines)
        + f"\n  They are in {unverified_path(to)} for inspection; don't use them. If the base "
        "model's files\n  changed since the run, start a new run; otherwise please report this."
    )


def _report_verification(verification: Verification, progress: Progress) -> None:
    if verification.quantization:
        progress.note("verified: reloaded from disk, the scores are the plan's on the originals")
        for score in verification.scores:
            progress.note(
                f"  {score.name}: {score.quantized:.4g} on {verification.quantization} in the "
                f"search, {score.reloaded:.4g} in full precision"
            )
    else:
        progress.note("verified: reloaded from disk, the scores are the trial's")
        for score in verification.scores:
            progress.note(
                f"  {score.name}: {score.trial:.4g} in the trial, {score.reloaded:.4g} reloaded"
            )
    for reason in verification.reasons:
        progress.note(f"  compared with a tolerance, because {reason}")


# Files


@contextmanager
def _interruption_explained(to: Path, progress: Progress) -> Iterator[None]:
    """Say where an interrupted export left its finished files, and how to resume it."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"the export to {to} stopped: {error.strerror or error}.\n"
            "  If the disk is full, free some space. The same command resumes the export."
        ) from error
    except BaseException:
        if partial_path(to).exists():
            progress.note(
                f"finished files are in {partial_path(to)}: the same command resumes from there; "
                "remove the folder if you don't want that"
            )
        raise


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.chmod(path, 0o644)
