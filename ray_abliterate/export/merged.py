"""The whole model, with the writers edited: file by file, one tensor at a time.

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
from ray_abliterate.ablation.planned_edits import Edits
from ray_abliterate.directions.directions import Blend, Directions
from ray_abliterate.export.checkpoint import Checkpoint, companions, read_into
from ray_abliterate.export.checkpoint_writers import StoredWriter
from ray_abliterate.export.file_layout import FileLayout, WeightFile
from ray_abliterate.export.scratch import CHUNK, Scratch, on_disk
from ray_abliterate.export.stored_parameters import Form
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.plan import Plan


@dataclass(frozen=True)
class _Task:
    """What a plan does to one writer."""

    target: StoredWriter
    blends: tuple[Blend, ...]
    strength: float


class EditedTensors:
    """The stored tensors that a plan changes, made when they are asked for."""

    def __init__(self, targets: Sequence[StoredWriter], plan: Plan, directions: Directions) -> None:
        self._norm = plan.norm
        self._edits: Edits[StoredWriter] = Edits(targets, remember=False)
        self._weights: dict[str, tuple[_Task, Form]] = {}
        self._biases: dict[str, _Task] = {}
        self._made: dict[str, Tensor] = {}
        self._open: dict[str, tuple[Edit, set[str]]] = {}
        for target, blends, strength in self._edits.planned(plan, directions):
            task = _Task(target, blends, strength)
            self._weights |= {name: (task, form) for form in target.forms for name in form.tensors}
            self._biases |= {name: task for form in target.bias_forms for name in form.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._weights or name in self._biases

    def __len__(self) -> int:
        return len(self._weights) + len(self._biases)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The edited tensor, contiguous, in one piece or expert by expert."""
        task, form = self._weights[name] if name in self._weights else (self._biases[name], None)
        edit = self._edit(task, name)
        if name in self._made:
            yield self._made.pop(name)
        elif form is None:
            self._made |= dict(task.target.edited_biases(edit))
            yield self._made.pop(name)
        elif form.kind == "experts":
            yield task.target.edited(form, form.tensors.index(name), edit)
        else:
            for expert in range(task.target.shape[0]):
                yield task.target.edited(form, expert, edit)

    def _edit(self, task: _Task, name: str) -> Edit:
        """The writer's edit: vectors, kept until its last tensor was asked for."""
        key = task.target.writer.parameter
        if key not in self._open:
            edit = self._edits.edit(task.target, self._norm, task.blends, task.strength)
            forms = (*task.target.forms, *task.target.bias_forms)
            self._open[key] = edit, {name for form in forms for name in form.tensors}
        edit, left = self._open[key]
        left.discard(name)
        if not left:
            del self._open[key]
        return edit


def write_merged(
    source: Checkpoint, layout: FileLayout, edited: EditedTensors, work: Scratch, progress: Progress
) -> None:
    """Write the weight files, the index and the companions into the scratch folder.

    Files that an earlier attempt finished are left as they are, once their hash was checked.
    """
    with progress.stage("weights"):
        for number, file in enumerate(layout.files, start=1):
            if not work.holds(file.name):
                written = _write(source, file, edited, work.folder / file.name)
                work.finish(file.name, file.bytes, written)
            progress.step(number, len(layout.files))
    with progress.stage("companion files"):
        for name in companions(source.folder):
            (work.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, work.folder / name)
        if layout.index is not None:
            (work.folder / "model.safetensors.index.json").write_bytes(layout.index)


def _write(source: Checkpoint, file: WeightFile, edited: EditedTensors, path: Path) -> str:
    """Write one file, and give its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as out:

        def put(data: bytes | memoryview) -> None:
            out.write(data)
            digest.update(data)

        put(file.header)
        for name in file.tensors:
            if name not in edited:
                _copy(source, name, put)
                continue
            for piece in edited.pieces(name):
                put(_bytes(piece))
        on_disk(out)
    path.chmod(0o644)
    return digest.hexdigest()


def _copy(source: Checkpoint, name: str, put: Callable[[memoryview], None]) -> None:
    stored = source.tensors[name]
    left = stored.stop - stored.start
    buffer = memoryview(bytearray(min(CHUNK, left)))
    with (source.folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.start)
        while left:
            chunk = buffer[: min(CHUNK, left)]
            read_into(file, chunk)
            put(chunk)
            left -= len(chunk)


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's own bytes, not copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
