"""A checkpoint folder: where the bytes of each tensor lie, and copies with some tensors replaced.

Whatever is not replaced is copied byte for byte, so names, dtypes, shards and tensors that no model
class loads (draft heads) survive. Knows nothing about models.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_abliterate.errors import ExportError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WRITTEN_ANEW = frozenset({"README.md", "verification.json"})
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
                    f"{folder} holds no {file}, and other forms of weights are not read.\n"
                    "  Convert the model to safetensors first, with save_pretrained."
                )
            tensors |= _header(folder, file)
        return cls(folder, tensors)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold tensors, and their index if there is one."""
        files = weight_file_names(self.folder)
        return files if files == (SINGLE,) else (*files, INDEX)

    @property
    def bytes(self) -> int:
        """Size of all files that a copy holds."""
        files = [*self.weight_files, *companions(self.folder)]
        return sum((self.folder / file).stat().st_size for file in files)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ExportError: its dtype is not one that weights are edited in.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ExportError(
                f"{name} is stored as {stored.dtype}: the checkpoint is quantized, and an edited "
                "weight cannot be put back into it.\n"
                "  Search and export an unquantized copy of the model (bfloat16 safetensors)."
            )
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.start)
            data = bytearray(file.read(stored.stop - stored.start))
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)

    def copy_to(self, folder: Path) -> "Checkpoint":
        """Copy weights and companion files, byte for byte, into an empty folder."""
        for file in (*self.weight_files, *companions(self.folder)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, folder / file)
        return type(self)(folder, self.tensors)

    def replace(self, name: str, value: Tensor) -> None:
        """Write a tensor over the stored one, in the stored dtype; the rest of the file stays."""
        stored = self.tensors[name]
        assert tuple(value.shape) == stored.shape
        new = value.detach().to("cpu", DTYPES[stored.dtype]).contiguous()
        with (self.folder / stored.file).open("r+b") as file:
            file.seek(stored.start)
            file.write(new.reshape(-1).view(torch.uint8).numpy().tobytes())


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


def companions(folder: Path) -> list[str]:
    """Everything else that belongs to the model: configs, tokenizer, templates, code, licences."""
    return sorted(path.relative_to(folder).as_posix() for path in _companion_paths(folder))


def _companion_paths(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        weights = any(path.name.endswith(suffix) for suffix in WEIGHT_SUFFIXES)
        anew = len(parts) == 1 and path.name in WRITTEN_ANEW
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
