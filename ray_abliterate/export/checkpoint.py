"""A checkpoint folder: where the bytes of each tensor lie. Knows nothing about models."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.errors import ExportError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WRITTEN_ANEW = frozenset({"README.md", "verification.json", "reproduced.json", "reproduce"})
WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .onnx_data .h5 .msgpack .ot .npz .tflite "
    ".mlmodel .nemo .index.json".split()
)
"""Other forms of the same weights: a copy of them beside the edited ones would be the old model."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its dtype's name, and its bytes from `start` to `stop`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder that transformers would load, by tensor."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers.

        Raises:
            ExportError: there are no safetensors files, or one is damaged.
        """
        tensors: dict[str, StoredTensor] = {}
        for file in weight_file_names(folder):
            if not (folder / file).is_file():
                raise ExportError(
                    f"{folder} holds no {file}{_instead(folder)}, and other forms of weights are "
                    "not read.\n  Convert the model to safetensors first, with save_pretrained."
                )
            tensors |= _header(folder, file)
        return cls(folder, tensors)

    @classmethod
    def of_file(cls, file: Path) -> "Checkpoint":
        """The tensors of one file, whatever its name.

        Raises:
            ExportError: it is damaged.
        """
        return cls(file.parent, _header(file.parent, file.name))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold tensors, and their index if there is one."""
        files = weight_file_names(self.folder)
        return files if files == (SINGLE,) else (*files, INDEX)

    @property
    def companion_bytes(self) -> int:
        """Size of everything else that a copy holds."""
        return sum((self.folder / file).stat().st_size for file in companions(self.folder))

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
        """One tensor, or one slice of it along the first axis. Nothing else is in memory.

        Raises:
            ExportError: its dtype is not one that weights are edited in, or the file is cut off.
        """
        self.refuse_unreadable(name)
        stored = self.tensors[name]
        size, shape, start = stored.stop - stored.start, stored.shape, stored.start
        if index is not None:
            size, shape = size // shape[0], shape[1:]
            start += index * size
        data = torch.empty(size, dtype=torch.uint8)  # aligned, as products are fast and equal
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(start)
            read_into(file, data.numpy().data)
        return data.view(DTYPES[stored.dtype]).reshape(shape)


def read_into(file: Any, view: memoryview) -> None:
    """Fill `view` from a file without a buffer.

    Raises:
        ExportError: the file ends before.
    """
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise ExportError(f"{file.name} is damaged: it ends before its tensors do")
        done += got


def _instead(folder: Path) -> str:
    """What a folder without safetensors has: `, but model.gguf`."""
    found = [p.name for p in sorted(folder.glob("*")) if p.suffix in WEIGHT_SUFFIXES]
    return f", but {found[0]}" if found else ""


def weight_file_names(folder: Path) -> tuple[str, ...]:
    """The safetensors files that transformers would load, by name; they need not be there yet.

    Raises:
        ExportError: the index names something else than files beside it.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return (SINGLE,)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = tuple(sorted(set(index["weight_map"].values())))
    strays = [file for file in files if Path(file).name != file]
    if strays:
        raise ExportError(f"{folder / INDEX} names {strays[0]!r}, which is not a file beside it")
    return files


def fetched(name: str, revision: str | None) -> Path:
    """The folder of a model of the Hub at a revision, with its safetensors files and no other form
    of its weights.

    Raises:
        OSError: it can't be read from the Hub or its cache.
        ValueError: its name can't be.
    """
    from huggingface_hub import snapshot_download

    weights = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".index.json"]
    folder = Path(snapshot_download(name, revision=revision, ignore_patterns=weights))
    names = list(weight_file_names(folder))
    snapshot_download(name, revision=revision, allow_patterns=names)
    return folder


def companions(folder: Path) -> list[str]:
    """Everything else that belongs to the model: configs, tokenizer, templates, code, licences."""
    return sorted(path.relative_to(folder).as_posix() for path in _companion_paths(folder))


def _companion_paths(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        weights = any(path.name.endswith(suffix) for suffix in WEIGHT_SUFFIXES)
        anew = parts[0] in WRITTEN_ANEW
        if path.is_file() and not (hidden or weights or anew):
            yield path


def _header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Tensors of one file: 8 bytes of length, so much JSON, then the bytes."""
    with (folder / file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > (folder / file).stat().st_size:
            raise ExportError(f"{folder / file} is damaged: its header is cut off")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            8 + length + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }
