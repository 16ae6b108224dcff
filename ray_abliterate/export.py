"""Writes the model that a trial's plan makes as a folder, and verifies what was written.

The folder is a copy of the checkpoint in which the writers' bytes are replaced; everything else is
the original's, byte for byte. It is reloaded and scored again before it gets its name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ray_abliterate.architecture import Writer, WriterRow, find_writers, hidden_size
from ray_abliterate.bundle import write_bundle
from ray_abliterate.checkpoint import WEIGHT_SUFFIXES, Checkpoint, weight_file_names
from ray_abliterate.directions import Directions
from ray_abliterate.errors import ExportError, ModelError, ScoreError
from ray_abliterate.frontier import Frontier, Trial
from ray_abliterate.loading import load
from ray_abliterate.model_card import hub_name, model_card
from ray_abliterate.progress import Watch
from ray_abliterate.prompts import PromptSet
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.run import load_prompts, model_source
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.verification import Verification, verify_export
from ray_abliterate.weights import WeightCache

SPARE = 1.1
"""Free disk space wanted, as a multiple of what is written."""


def export_trial(
    directory: RunDirectory, trial: Trial, to: Path, watch: Watch, verify: bool = True
) -> Path:
    """Write the edited model into the folder `to`, which appears when it is complete and verified.

    Raises:
        ExportError: it cannot be written, or the written files don't score as the trial did; these
            are kept under `<to>.unverified`. Or it is to be verified, and the trial is bounded.
    """
    to = to.absolute()
    if verify:
        refuse_bounded(directory, trial, to)
    recipe = directory.recipe
    directions = directory.directions()
    if directions is None:
        raise ExportError(f"{directory.path} has no directions; start a new run of the recipe")
    source = Checkpoint.open(source_folder(directory, watch))
    check_target(to, source)
    scored: dict[str, PromptSet] = {}
    if verify:
        base = directory.base
        scored = load_prompts(recipe, directory, base, watch).scored
    with _scratch(to) as work, _threads(directory):
        dtype = write_weights(recipe, source, trial, directions, work, watch)
        _write_text(work / "README.md", model_card(directory, trial, source.folder))
        write_bundle(directory, trial, source.folder, work)
        if verify:
            try:
                found = verify_export(directory, trial, scored, source.folder, work, dtype, watch)
            except (ModelError, ScoreError) as error:
                raise _unverified(work, to, [f"  {error}"]) from error
            text = json.dumps(asdict(found), indent=2)
            _write_text(work / "verification.json", text + "\n")
            if found.failures:
                raise _unverified(work, to, found.failures)
            _tell(found, watch)
        if to.exists():
            to.rmdir()
        work.rename(to)
    watch.note(f"trial {trial.number} written to {to}")
    return to


# Before anything is loaded


def refuse_bounded(directory: RunDirectory, trial: Trial, to: Path) -> None:
    """Refuse a trial whose scores are bounds: there is nothing to verify the written files by.

    Raises:
        ExportError: it is one; names the trial that is better.
    """
    if not trial.bounded:
        return
    lines = [
        f"trial {trial.number} was stopped early: its scores are bounds, by which no files can be "
        "verified."
    ]
    better = Frontier.of(directory.trials()).better_than(trial)
    if better is not None:
        command = f"ray-abliterate export {directory.path} --trial {better.number} --to {to}"
        lines.append(f"Export trial {better.number}, which is better whatever came:\n    {command}")
    lines.append(f"To write trial {trial.number} unverified, add --no-verify.")
    raise ExportError("\n  ".join(lines))


def source_folder(directory: RunDirectory, watch: Watch) -> Path:
    """The folder of the base model; one on the Hub is looked up at the run's own revision.

    Raises:
        ExportError: the run's model was a folder, and is not there.
    """
    name = hub_name(directory)
    if name is None:
        return Path(model_source(directory.recipe.model.name, watch.note)).resolve()
    revision = directory.environment["model"].get("revision")
    if revision is None:
        raise ExportError(
            f"{name} is not there, and the run's model did not come from the Hub.\n"
            "  A relative folder counts from where the run was started: export from there."
        )
    from huggingface_hub import snapshot_download

    weights = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".index.json"]
    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=weights))
        names = weight_file_names(folder)
        snapshot_download(name, revision=revision, allow_patterns=list(names))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{name} at revision {revision} cannot be read from the Hub or its cache.\n  {error}"
        ) from error
    return folder


def check_target(to: Path, source: Checkpoint) -> None:
    """Refuse a folder that cannot take the model.

    Raises:
        ExportError: it is occupied, inside the base model's folder, or the disk is too full.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ExportError(f"{to} exists and is not an empty folder; choose another one with --to.")
    if unverified_name(to).exists():
        raise ExportError(f"{unverified_name(to)} is left of an earlier export; remove it first.")
    if to.is_relative_to(source.folder):
        raise ExportError(f"{to} lies inside the base model's folder; choose another one.")
    standing = next(place for place in to.parents if place.exists())
    free, wanted = shutil.disk_usage(standing).free, SPARE * source.bytes
    if free < wanted:
        raise ExportError(
            f"the export needs {wanted / 1e9:.2f} GB, but {standing} has {free / 1e9:.2f} GB "
            "free.\n  Free some space, or choose a folder on another disk with --to."
        )


def unverified_name(to: Path) -> Path:
    """Where an export goes that did not score as the trial did."""
    return to.with_name(f"{to.name}.unverified")


# Writing


def write_weights(
    recipe: Recipe,
    source: Checkpoint,
    trial: Trial,
    directions: Directions,
    folder: Path,
    watch: Watch,
) -> torch.dtype:
    """Copy the checkpoint, and put the edited writers into the copy.

    Returns:
        The checkpoint's dtype, in which the edit was made.

    Raises:
        ExportError: the checkpoint does not hold the writers as the model has them, or the model
            is not the one of the run.
    """
    with watch.stage("model"):
        module, _ = load(str(source.folder), settings_as_stored(recipe.model))
        rows = tuple(WriterRow(**row.model_dump()) for row in recipe.model.writers)
        writers = find_writers(module, rows)
    shape = (1 + max(writer.layer for writer in writers), hidden_size(module))
    if shape[1] != directions.vectors.shape[1] or shape[0] > directions.layers:
        raise ExportError(
            f"{source.folder} has {shape[0]} layers of width {shape[1]}, the run's directions are "
            f"for {directions.layers} of width {directions.vectors.shape[1]}: another model"
        )
    refuse_unlike(source, module, writers)
    location: Literal["cpu", "device"] = "cpu" if recipe.model.weight_cache == "cpu" else "device"
    cache = WeightCache(module, writers, location)
    with watch.stage("copy"):
        copy = source.copy_to(folder)
    with watch.stage("weights"), cache.edited(trial.plan, directions):
        for number, writer in enumerate(writers, start=1):
            for name, value in stored_form(module, writer, source):
                if not torch.equal(copy.read(name).to(value.dtype), value.cpu()):
                    copy.replace(name, value)
            watch.step(number, len(writers))
    dtype: torch.dtype = module.dtype  # type: ignore[assignment]
    return dtype


def settings_as_stored(settings: ModelSettings) -> ModelSettings:
    """The settings, for a local folder whose model keeps its own dtype."""
    return settings.model_copy(update={"dtype": "auto", "revision": None})


def refuse_unlike(source: Checkpoint, module: nn.Module, writers: tuple[Writer, ...]) -> None:
    """Make sure that each writer's stored form is what the untouched checkpoint holds.

    Raises:
        ExportError: it is not, so an edit could not be put back.
    """
    for writer in writers:
        for name, value in stored_form(module, writer, source):
            stored = source.read(name)
            same = stored.shape == value.shape
            if not same or not torch.equal(stored.to(value.dtype), value.cpu()):
                raise ExportError(
                    f"{name} in {source.folder} is not what {writer.parameter} was loaded from, so "
                    "its edit cannot be put back.\n  Save the model anew with save_pretrained, and "
                    "run the recipe on that folder."
                )


def stored_form(module: Any, writer: Writer, source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The writer's weight and bias as the checkpoint names and cuts them.

    transformers may rename tensors or stack experts as it loads; that is undone. A parameter that
    layers share has several names, of which the checkpoint need not hold all.

    Raises:
        ExportError: the checkpoint lacks a tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for parameter in filter(None, (writer.parameter, writer.bias)):
        tensor = module.get_parameter(parameter)
        state = module.state_dict(keep_vars=True)
        names = {name: value.data for name, value in state.items() if value is tensor}
        parts = revert_weight_conversion(module, names)
        held = {
            held: value for name, value in parts.items() if (held := _held(name, module, source))
        }
        if not held or (len(held) < len(parts) and len(names) == 1):
            missing = next(name for name in parts if not _held(name, module, source))
            raise ExportError(
                f"{source.folder} holds no tensor {missing}, so the edit of {parameter} cannot be "
                "put back.\n  If the checkpoint is quantized, search and export an unquantized "
                "copy of the model."
            )
        yield from held.items()


def _held(name: str, module: Any, source: Checkpoint) -> str | None:
    """The checkpoint's name for a tensor: loading drops or adds the prefix of the model's body."""
    prefix = f"{module.base_model_prefix}."
    forms = (name, prefix + name, name.removeprefix(prefix))
    return next((form for form in forms if form in source.tensors), None)


# When it is not the trial


def _unverified(work: Path, to: Path, lines: list[str]) -> ExportError:
    """Keep the folder under another name, and say why."""
    work.rename(unverified_name(to))
    return ExportError(
        "the written files do not score as the trial did:\n"
        + "\n".join(lines)
        + f"\n  They are kept in {unverified_name(to)} for a look; don't use them. If the base "
        "model's files\n  changed since the run, start a new run; otherwise please report this."
    )


def _tell(found: Verification, watch: Watch) -> None:
    watch.note("verified: reloaded from disk, the scores are the trial's")
    for score in found.scores:
        watch.note(f"  {score.name}: {score.trial:.4g} in the trial, {score.reloaded:.4g} reloaded")
    for reason in found.reasons:
        watch.note(f"  compared with a tolerance, because {reason}")


# Files


@contextmanager
def _scratch(to: Path) -> Iterator[Path]:
    """A folder beside `to`, gone after the block unless it was renamed."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    except OSError as error:
        raise ExportError(
            f"{to.parent} cannot be written ({error.strerror}); choose another folder with --to."
        ) from None
    try:
        work.chmod(0o755)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _threads(directory: RunDirectory) -> Iterator[None]:
    """The search's number of CPU threads: another one sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(directory.environment["replicas"]["threads"] or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.chmod(path, 0o644)
