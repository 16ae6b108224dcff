"""Writes the whole model with its writers edited, file by file and one tensor at a time.

In memory are one chunk of the file, or one expert of a writer with its float32 copies. What is not
a writer is copied byte for byte, whatever it is.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.ablation.planned_edits import PlannedEdits
from ray_abliterate.directions.directions import Blend, Directions
from ray_abliterate.export.checkpoint import Checkpoint, companion_files, read_into
from ray_abliterate.export.checkpoint_writers import StoredWriter
from ray_abliterate.export.file_layout import FileLayout, WeightFile
from ray_abliterate.export.output_folder import PartialExport, sync_to_disk
from ray_abliterate.export.stored_parameters import StoredForm
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.plan import Plan

CHUNK_BYTES = 2**24
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class _WriterTask:
    """What a plan does to one writer: the directions to take out of it, and the strength."""

    target: StoredWriter
    blends: tuple[Blend, ...]
    strength: float


class EditedTensors:
    """The stored tensors that a plan changes, each computed when it is asked for."""

    def __init__(self, targets: Sequence[StoredWriter], plan: Plan, directions: Directions) -> None:
        self._norm = plan.norm
        self._edits: PlannedEdits[StoredWriter] = PlannedEdits(targets, remember=False)
        self._weights: dict[str, tuple[_WriterTask, StoredForm]] = {}
        self._biases: dict[str, _WriterTask] = {}
        # copies of a bias that was edited, until they are asked for
        self._ready: dict[str, Tensor] = {}
        # by writer: its edit, and the tensors that still need it
        self._edits_in_use: dict[str, tuple[Edit, set[str]]] = {}
        for target, blends, strength in self._edits.edited_targets(plan, directions):
            task = _WriterTask(target, blends, strength)
            self._weights |= {name: (task, form) for form in target.forms for name in form.tensors}
            self._biases |= {name: task for form in target.bias_forms for name in form.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._weights or name in self._biases

    def __len__(self) -> int:
        return len(self._weights) + len(self._biases)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield an edited tensor, contiguous and in the stored dtype: whole, or by expert."""
        task, form = self._weights[name] if name in self._weights else (self._biases[name], None)
        edit = self._edit_for(task, name)
        if name in self._ready:
            yield self._ready.pop(name)
        elif form is None:
            self._ready |= dict(task.target.edited_biases(edit))
            yield self._ready.pop(name)
        elif form.kind == "experts":
            yield task.target.edited_expert(form, form.tensors.index(name), edit)
        else:
            for expert in range(task.target.shape[0]):
                yield task.target.edited_expert(form, expert, edit)

    def _edit_for(self, task: _WriterTask, name: str) -> Edit:
        """Return a writer's edit, which is a few vectors, until its last tensor was asked for."""
        key = task.target.writer.parameter
        if key not in self._edits_in_use:
            edit = self._edits.make_edit(task.target, self._norm, task.blends, task.strength)
            forms = (*task.target.forms, *task.target.bias_forms)
            self._edits_in_use[key] = edit, {name for form in forms for name in form.tensors}
        edit, remaining = self._edits_in_use[key]
        remaining.discard(name)
        if not remaining:
            del self._edits_in_use[key]
        return edit


def write_merged(
    source: Checkpoint,
    layout: FileLayout,
    edited: EditedTensors,
    partial: PartialExport,
    progress: Progress,
) -> None:
    """Write the weight files, the index and the companion files into the partial folder.

    Files that an earlier attempt finished stay as they are, once their hash was checked.
    """
    with progress.stage("weights"):
        for number, file in enumerate(layout.files, start=1):
            if not partial.has_intact(file.name):
                sha256 = _write_file(source, file, edited, partial.folder / file.name)
                partial.record_finished(file.name, file.bytes, sha256)
            progress.step(number, len(layout.files))
    with progress.stage("companion files"):
        for name in companion_files(source.folder):
            (partial.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, partial.folder / name)
        if layout.index is not None:
            (partial.folder / "model.safetensors.index.json").write_bytes(layout.index)


def _write_file(source: Checkpoint, file: WeightFile, edited: EditedTensors, path: Path) -> str:
    """Write one weight file and return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as out:

        def put(data: bytes | memoryview) -> None:
            out.write(data)
            digest.update(data)

        put(file.header)
        for name in file.tensors:
            if name not in edited:
                _copy_tensor(source, name, put)
                continue
            for piece in edited.pieces(name):
                put(_as_bytes(piece))
        sync_to_disk(out)
    path.chmod(0o644)
    return digest.hexdigest()


def _copy_tensor(source: Checkpoint, name: str, put: Callable[[memoryview], None]) -> None:
    stored = source.tensors[name]
    remaining = stored.bytes
    buffer = memoryview(bytearray(min(CHUNK_BYTES, remaining)))
    with (source.folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.start)
        while remaining:
            chunk = buffer[: min(CHUNK_BYTES, remaining)]
            read_into(file, chunk)
            put(chunk)
            remaining -= len(chunk)


def _as_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's values as bytes, without a copy on the CPU."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
