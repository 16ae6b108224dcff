"""Finds the full-precision model that an export edits: the run's own, or, after a search on a
quantized checkpoint, the originals that it was made of, if they are.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_abliterate.data.hub import MODEL_NAME
from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint import Checkpoint, fetched
from ray_abliterate.export.public_names import EMBEDDED, Original, Published
from ray_abliterate.export.stored_parameters import StoredForms
from ray_abliterate.model.architecture import WriterRow, find_blocks, find_writers, hidden_size
from ray_abliterate.model.skeleton import skeleton_of_folder
from ray_abliterate.model.source import model_source
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import ModelSettings

ROWS = 256
"""Token embeddings that are compared."""
STREAM = 0.1
"""Relative difference of these that rounding may explain (8 bits: 4 %)."""


def find_original(directory: RunDirectory, given: str | None, progress: Progress) -> Original:
    """The model whose weights an export of a run edits.

    Args:
        directory: The run.
        given: `--originals`: a folder, a Hub name, or one with a revision, as `owner/name@commit`.
            For runs that searched on a quantized checkpoint, and these only: others were scored on
            the weights that are written, and of other weights their scores would say nothing.
        progress: Receives what was chosen.

    Raises:
        ExportError: it is given and should not be, or the reverse; it can't be had; or it is
            not what the quantized checkpoint was made of.
        ModelError: it holds no model, or a quantized one.
    """
    searched = Published.searched(directory)
    method = quantized_checkpoint(directory)
    if given is None:
        if method:
            raise ExportError(
                f"{searched.called} is quantized ({method}), and only full-precision weights can "
                "be written.\n  Name what it was made of, and the plan is applied to that:\n"
                f"    ray-abliterate export {directory.path} --to FOLDER --originals "
                "FOLDER_OR_HUB_NAME"
            )
        return Original(source_folder(directory, progress), searched)
    if not method:
        raise ExportError(
            f"--originals {given}: the run did not search on a quantized checkpoint, but on "
            f"{searched.called}.\n  Its scores are of that, and say nothing of other weights: "
            "leave --originals out."
        )
    folder, base = _resolved(given, progress)
    with progress.stage("architecture of the originals"):
        refuse_other(source_folder(directory, progress), folder, directory.read_recipe().model, given)
    at = f" at revision {base.revision}" if base.revision else ""
    progress.note(f"originals: {base.called}{at}; the search ran on {searched.called} ({method})")
    return Original(folder, base, searched)


def quantized_checkpoint(directory: RunDirectory) -> str:
    """How the checkpoint is quantized that a run searched on; empty if it is not."""
    if directory.read_recipe().model.quantization is not None:  # as it was loaded: the checkpoint is not
        return ""
    return str(directory.read_environment()["model"].get("quantization", ""))


def source_folder(directory: RunDirectory, progress: Progress) -> Path:
    """The folder of the model that a run searched on; one on the Hub is looked up at the run's own
    revision.

    Raises:
        ExportError: the run's model was a folder, and is not there.
    """
    searched = Published.searched(directory)
    if searched.hub is None:
        return Path(model_source(directory.read_recipe().model.name, progress.note)).resolve()
    if searched.revision is None:
        raise ExportError(
            f"{searched.hub} is not there, and the run's model did not come from the Hub.\n"
            "  A relative folder counts from where the run was started: export from there."
        )
    return _fetched(searched.hub, searched.revision)


def published(given: str) -> Published:
    """What the model is called that `--originals` means.

    Raises:
        ExportError: it is not a folder, and can't be a model of the Hub.
    """
    if given in EMBEDDED or Path(given).is_dir():
        return Published.of(given)
    name, _, revision = given.partition("@")
    if not MODEL_NAME.fullmatch(name):
        raise ExportError(
            f"--originals {given!r} is not a folder, and not the name of a model on the Hub.\n"
            "  Write OWNER/NAME, or OWNER/NAME@REVISION."
        )
    return Published(name, name, revision or None)


def _resolved(given: str, progress: Progress) -> tuple[Path, Published]:
    """The folder that `--originals` means, and what it is called in public."""
    if given in EMBEDDED or Path(given).is_dir():
        return Path(model_source(given, progress.note)).resolve(), published(given)
    named = published(given)
    assert named.hub is not None
    folder = _fetched(named.hub, named.revision)
    commit = folder.name if folder.parent.name == "snapshots" else named.revision
    return folder, replace(named, revision=commit)


def _fetched(name: str, revision: str | None) -> Path:
    try:
        return fetched(name, revision)
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ExportError(
            f"{name}{at} cannot be read from the Hub or its cache.\n  {error}"
        ) from error


# Whether they are the originals


def refuse_other(quantized: Path, original: Path, settings: ModelSettings, given: str) -> None:
    """Make sure that a checkpoint may be a quantized form of a model: that they have the same
    architecture, and the same residual stream. Reads no weights but some token embeddings.

    Args:
        quantized: Folder of the checkpoint.
        original: Folder of the model.
        settings: Writers of the recipe, and whether code may run.
        given: What the user called the model.

    Raises:
        ExportError: it is not.
        ModelError: one of them holds no model, or the original is quantized.
    """
    ours = skeleton_of_folder(quantized, settings, unquantized=True)
    theirs = skeleton_of_folder(original, settings)
    rows = tuple(WriterRow(**row.model_dump()) for row in settings.writers)
    difference = _difference(ours, theirs, rows)
    if difference:
        raise ExportError(
            f"--originals {given} is not the model that the run's checkpoint was made of:\n"
            f"  {difference}.\n  Name its full-precision original."
        )
    apart = _apart(_embeddings(ours, quantized), _embeddings(theirs, original))
    if apart > STREAM:
        raise ExportError(
            f"--originals {given} has the architecture of the run's checkpoint, but another "
            f"residual stream:\n  its token embeddings differ by {apart:.0%} (rounding explains "
            f"{STREAM:.0%} at most).\n  Name the model that the checkpoint was made of. If it was "
            "rotated before (QuaRot, SpinQuant),\n  its directions are those of no other model: "
            "search on the original."
        )


def _difference(ours: nn.Module, theirs: nn.Module, rows: tuple[WriterRow, ...]) -> str:
    """What differs between the architectures of a checkpoint and another; empty if nothing does."""
    own, other = _facts(ours), _facts(theirs)
    for what, value in own.items():
        if other[what] != value:
            return f"its {what} is {other[what]}, the checkpoint's {value}"
    own_shapes, other_shapes = _shapes(ours, rows), _shapes(theirs, rows)
    for name in sorted(own_shapes.keys() | other_shapes.keys()):
        pair = other_shapes.get(name), own_shapes.get(name)
        if pair[0] != pair[1]:
            shapes = [str(shape) if shape else "not there" for shape in pair]
            return f"its {name} is {shapes[0]}, the checkpoint's {shapes[1]}"
    return ""


def _facts(module: nn.Module) -> dict[str, object]:
    return {
        "model type": module.config.model_type,  # type: ignore[union-attr]
        "number of layers": len(find_blocks(module)[1]),
        "hidden size": hidden_size(module),
    }


def _shapes(module: nn.Module, rows: tuple[WriterRow, ...]) -> dict[str, tuple[int, ...]]:
    """Of the writers, by name."""
    writers = find_writers(module, rows, in_memory=False)
    return {w.parameter: tuple(module.get_parameter(w.parameter).shape) for w in writers}


def _embeddings(module: nn.Module, folder: Path) -> Tensor | None:
    """Some rows of the token embeddings, spread over the vocabulary, in float32.

    None if they are stored in another way: quantized, too.
    """
    weight = module.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    name = next(name for name, value in module.named_parameters() if value is weight)
    source = Checkpoint.open(folder)
    try:
        form = StoredForms(module, source).of(name)[0]
    except ExportError:
        return None
    tokens = range(0, weight.shape[0], -(-weight.shape[0] // ROWS))
    return torch.stack([source.read(form.tensors[0], token) for token in tokens]).float()


def _apart(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Relative difference in Frobenius norm; 0 where it can't be told."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return 0.0
    return float((ours - theirs).norm() / theirs.norm())
