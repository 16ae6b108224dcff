"""Finds the full-precision model that an export edits.

It is the run's own model or, after a search on a quantized checkpoint, the originals that were
quantized; whether the given ones can be those is checked.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_abliterate.data.hub import MODEL_NAME
from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint import Checkpoint, fetch_checkpoint
from ray_abliterate.export.public_names import EMBEDDED, PublicName
from ray_abliterate.export.stored_parameters import StoredParameters
from ray_abliterate.model.architecture import WriterRow, find_blocks, find_writers, hidden_size
from ray_abliterate.model.skeleton import skeleton_of_folder
from ray_abliterate.model.source import resolve_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import ModelSettings

COMPARED_TOKENS = 256
"""Token embeddings that are compared."""
MOST_EMBEDDING_DIFFERENCE = 0.1
"""Relative difference of embeddings that rounding may explain (8 bits: 4 %)."""


@dataclass(frozen=True)
class OriginalModel:
    """The full-precision model whose weights an export edits.

    Attributes:
        folder: Where its checkpoint is.
        base: Its public name.
        quantized: The quantized form of it that the run searched on, if that is another checkpoint.
    """

    folder: Path
    base: PublicName
    quantized: PublicName | None = None


def find_original(directory: RunDirectory, given: str | None, progress: Progress) -> OriginalModel:
    """Find the model whose weights an export of a run edits.

    Args:
        directory: The run.
        given: `--originals`: a folder, a Hub name, or one with a revision, as `owner/name@commit`.
            It is for runs that searched on a quantized checkpoint, and these only: others were
            scored on the weights that are written, and their scores say nothing of other weights.
        progress: Is notified of the choice.

    Raises:
        ExportError: it is given and should not be, or the reverse; it can't be read; or it is
            not what the quantized checkpoint was made of.
        ModelError: it holds no model, or a quantized one.
    """
    searched = PublicName.searched(directory)
    method = quantization_of(directory)
    if given is None:
        if method:
            raise ExportError(
                f"{searched.called} is quantized ({method}), and only full-precision weights can "
                "be written.\n  Name the model it was made from, and the plan is applied to that:\n"
                f"    ray-abliterate export {directory.path} --to FOLDER --originals "
                "FOLDER_OR_HUB_NAME"
            )
        return OriginalModel(source_folder(directory, progress), searched)
    if not method:
        raise ExportError(
            f"--originals {given}: the run did not search on a quantized checkpoint, but on "
            f"{searched.called}.\n  Its scores say nothing of other weights: leave --originals out."
        )
    folder, base = _fetch_originals(given, progress)
    with progress.stage("architecture of the originals"):
        settings = directory.read_recipe().model
        refuse_other_model(source_folder(directory, progress), folder, settings, given)
    at = f" at revision {base.revision}" if base.revision else ""
    progress.note(f"originals: {base.called}{at}; the search ran on {searched.called} ({method})")
    return OriginalModel(folder, base, searched)


def quantization_of(directory: RunDirectory) -> str:
    """Return how the checkpoint that a run searched on is quantized; empty if it is not."""
    if directory.read_recipe().model.quantization is not None:  # on loading: the files are not
        return ""
    return str(directory.read_environment()["model"].get("quantization", ""))


def source_folder(directory: RunDirectory, progress: Progress) -> Path:
    """Return the folder of the model that a run searched on, fetching it from the Hub if need be.

    A model on the Hub is read at the run's own revision.

    Raises:
        ExportError: the run's model was a folder, and is gone.
    """
    searched = PublicName.searched(directory)
    if searched.hub is None:
        name = directory.read_recipe().model.name
        return Path(resolve_model(name, progress.note)).resolve()
    if searched.revision is None:
        raise ExportError(
            f"{searched.hub} is not there, and the run's model did not come from the Hub.\n"
            "  A relative folder counts from where the run was started: export from there."
        )
    return _fetch(searched.hub, searched.revision)


def public_name_of(given: str) -> PublicName:
    """Return the public name of the model that `--originals` means.

    Raises:
        ExportError: it is not a folder, and can't be a model of the Hub.
    """
    if given in EMBEDDED or Path(given).is_dir():
        return PublicName.of(given)
    name, _, revision = given.partition("@")
    if not MODEL_NAME.fullmatch(name):
        raise ExportError(
            f"--originals {given!r} is not a folder, and not the name of a model on the Hub.\n"
            "  Write OWNER/NAME, or OWNER/NAME@REVISION."
        )
    return PublicName(name, name, revision or None)


def _fetch_originals(given: str, progress: Progress) -> tuple[Path, PublicName]:
    """Return the folder that `--originals` means, and the model's public name."""
    if given in EMBEDDED or Path(given).is_dir():
        return Path(resolve_model(given, progress.note)).resolve(), public_name_of(given)
    public = public_name_of(given)
    assert public.hub is not None
    folder = _fetch(public.hub, public.revision)
    commit = folder.name if folder.parent.name == "snapshots" else public.revision
    return folder, replace(public, revision=commit)


def _fetch(name: str, revision: str | None) -> Path:
    try:
        return fetch_checkpoint(name, revision)
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ExportError(
            f"{name}{at} cannot be read from the Hub or its cache.\n  {error}"
        ) from error


# Whether they are the originals


def refuse_other_model(
    quantized: Path, original: Path, settings: ModelSettings, given: str
) -> None:
    """Make sure that a checkpoint can be a quantized form of a model.

    Both must have the same architecture and the same residual stream. Reads no weights but some
    token embeddings.

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
    difference = _architecture_difference(ours, theirs, rows)
    if difference:
        raise ExportError(
            f"--originals {given} is not the model that the run's checkpoint was made of:\n"
            f"  {difference}.\n  Name its full-precision original."
        )
    apart = _relative_difference(_embeddings(ours, quantized), _embeddings(theirs, original))
    if apart > MOST_EMBEDDING_DIFFERENCE:
        raise ExportError(
            f"--originals {given} has the architecture of the run's checkpoint, but another "
            f"residual stream:\n  its token embeddings differ by {apart:.0%} (rounding explains "
            f"{MOST_EMBEDDING_DIFFERENCE:.0%} at most).\n  Name the model that the checkpoint was "
            "made of. If it was rotated before (QuaRot, SpinQuant),\n  its directions are those of "
            "no other model: search on the original."
        )


def _architecture_difference(
    ours: nn.Module, theirs: nn.Module, rows: tuple[WriterRow, ...]
) -> str:
    """Say what differs between a checkpoint's architecture and another; empty if nothing does."""
    own, other = _architecture_facts(ours), _architecture_facts(theirs)
    for fact, value in own.items():
        if other[fact] != value:
            return f"its {fact} is {other[fact]}, the checkpoint's {value}"
    own_shapes, other_shapes = _writer_shapes(ours, rows), _writer_shapes(theirs, rows)
    for name in sorted(own_shapes.keys() | other_shapes.keys()):
        pair = other_shapes.get(name), own_shapes.get(name)
        if pair[0] != pair[1]:
            shapes = [str(shape) if shape else "not there" for shape in pair]
            return f"its {name} is {shapes[0]}, the checkpoint's {shapes[1]}"
    return ""


def _architecture_facts(module: nn.Module) -> dict[str, object]:
    return {
        "model type": module.config.model_type,  # type: ignore[union-attr]
        "number of layers": len(find_blocks(module)[1]),
        "hidden size": hidden_size(module),
    }


def _writer_shapes(module: nn.Module, rows: tuple[WriterRow, ...]) -> dict[str, tuple[int, ...]]:
    writers = find_writers(module, rows, in_memory=False)
    return {w.parameter: tuple(module.get_parameter(w.parameter).shape) for w in writers}


def _embeddings(module: nn.Module, folder: Path) -> Tensor | None:
    """Read some rows of the token embeddings, spread over the vocabulary, in float32.

    Returns:
        `"token hidden"`; None if they are stored in another way, which includes quantized.
    """
    weight = module.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    name = next(name for name, value in module.named_parameters() if value is weight)
    source = Checkpoint.open(folder)
    try:
        form = StoredParameters(module, source).forms_of(name)[0]
    except ExportError:
        return None
    tokens = range(0, weight.shape[0], -(-weight.shape[0] // COMPARED_TOKENS))
    return torch.stack([source.read(form.tensors[0], token) for token in tokens]).float()


def _relative_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Return the difference in Frobenius norm, relative to `theirs`; 0 where it can't be told."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return 0.0
    return float((ours - theirs).norm() / theirs.norm())
