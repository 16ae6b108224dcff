"""A checkpoint folder: which files it has, and where the bytes of each tensor lie.

Knows nothing about models.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.data.safetensors_header import read_header
from ray_abliterate.errors import ExportError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WRITTEN_ANEW = frozenset({"README.md", "verification.json", "reproduced.json", "reproduce"})
"""What an export writes itself, and so does not copy from the model."""
WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .onnx_data .h5 .msgpack .ot .npz .tflite "
    ".mlmodel .nemo .index.json".split()
)
"""Other forms of the same weights: copied along, they would be the unedited model."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file's name.
        dtype: Its type as the format spells it, such as `BF16`.
        shape: Its shape.
        start: Its first byte, counted from the beginning of the file.
        stop: The byte after its last.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """The size of its values in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder that transformers would load, by tensor."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a folder's weight files.

        Raises:
            ExportError: a safetensors file is missing or damaged.
        """
        tensors: dict[str, StoredTensor] = {}
        for file in weight_file_names(folder):
            if not (folder / file).is_file():
                raise ExportError(
                    f"{folder} holds no {file}{_other_weights(folder)}; only safetensors files "
                    "are read.\n  Convert the model first, with save_pretrained."
                )
            tensors |= _read_tensors(folder, file)
        return cls(folder, tensors)

    @classmethod
    def of_file(cls, file: Path) -> "Checkpoint":
        """Read the header of one file, whatever its name.

        Raises:
            ExportError: it is damaged.
        """
        return cls(file.parent, _read_tensors(file.parent, file.name))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold tensors, and their index if there is one."""
        files = weight_file_names(self.folder)
        return files if files == (SINGLE,) else (*files, INDEX)

    @property
    def companion_bytes(self) -> int:
        """The size of everything else that a copy holds."""
        return sum((self.folder / file).stat().st_size for file in companion_files(self.folder))

    def refuse_unreadable(self, name: str) -> None:
        """Make sure that a tensor's dtype is one that weights are edited in.

        Raises:
            ExportError: it is not.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ExportError(
                f"{name} is stored as {stored.dtype}: the checkpoint is quantized, and an edited "
                "weight cannot be put back into it.\n"
                "  Search and export an unquantized copy of the model (bfloat16 safetensors)."
            )

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read one tensor, or one slice of it along the first axis, and nothing else.

        Args:
            name: The tensor.
            index: The slice; all of the tensor if None.

        Raises:
            ExportError: its dtype is not one that weights are edited in, or the file is cut off.
        """
        self.refuse_unreadable(name)
        stored = self.tensors[name]
        size, shape, start = stored.bytes, stored.shape, stored.start
        if index is not None:
            size, shape = size // shape[0], shape[1:]
            start += index * size
        data = torch.empty(size, dtype=torch.uint8)  # aligned, so that products have the same bits
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(start)
            read_into(file, data.numpy().data)
        return data.view(DTYPES[stored.dtype]).reshape(shape)


def read_into(file: Any, view: memoryview) -> None:
    """Fill `view` from an unbuffered file.

    Raises:
        ExportError: the file ends before the view is full.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ExportError(f"{file.name} is damaged: it ends before its tensors do")
        done += count


def _other_weights(folder: Path) -> str:
    """Name another form of the weights that a folder holds: `, but model.gguf`."""
    others = [p.name for p in sorted(folder.glob("*")) if p.suffix in WEIGHT_SUFFIXES]
    return f", but {others[0]}" if others else ""


def weight_file_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the safetensors files that transformers would load.

    They need not be there yet.

    Raises:
        ExportError: the index names a file outside the folder.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return (SINGLE,)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = tuple(sorted(set(index["weight_map"].values())))
    strays = [file for file in files if Path(file).name != file]
    if strays:
        raise ExportError(
            f"{folder / INDEX} names {strays[0]!r}, which is not a file in the same folder"
        )
    return files


def fetch_checkpoint(name: str, revision: str | None) -> Path:
    """Fetch a model of the Hub, with its safetensors files and no other form of its weights.

    Returns:
        The folder of the snapshot.

    Raises:
        OSError: the model can't be read from the Hub or its cache.
        ValueError: its name can't be one on the Hub.
    """
    from huggingface_hub import snapshot_download

    weights = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".index.json"]
    folder = Path(snapshot_download(name, revision=revision, ignore_patterns=weights))
    names = list(weight_file_names(folder))
    snapshot_download(name, revision=revision, allow_patterns=names)
    return folder


def companion_files(folder: Path) -> list[str]:
    """Return the files of a model beside its weights: configs, tokenizer, code, licences.

    Paths are relative to the folder, with forward slashes.
    """
    return sorted(path.relative_to(folder).as_posix() for path in _companion_paths(folder))


def _companion_paths(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        weights = any(path.name.endswith(suffix) for suffix in WEIGHT_SUFFIXES)
        if path.is_file() and not (hidden or weights or parts[0] in WRITTEN_ANEW):
            yield path


def _read_tensors(folder: Path, file: str) -> dict[str, StoredTensor]:
    try:
        header = read_header(folder / file)
    except ValueError as error:
        raise ExportError(f"{folder / file} is damaged: {error}") from None
    return {
        name: StoredTensor(file, entry.dtype, entry.shape, entry.start, entry.stop)
        for name, entry in header.tensors.items()
    }
