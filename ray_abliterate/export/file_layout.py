"""The weight files of an export: their names, their headers, and the order of their tensors.

They are either the original's files, header for header, or new ones of a chosen size with a new
index. Knows nothing about models or edits.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.data.safetensors_header import read_header
from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint import INDEX, SINGLE, Checkpoint, StoredTensor

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to write: the header, then the tensors' bytes in this order.

    Attributes:
        name: Its name.
        header: Its first bytes, up to the first tensor.
        tensors: Names of its tensors, in the order of their bytes.
        bytes: Its size.
    """

    name: str
    header: bytes
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class FileLayout:
    """All weight files, and the content of the index file if there is one."""

    files: tuple[WeightFile, ...]
    index: bytes | None

    @property
    def bytes(self) -> int:
        """The size of the weight files."""
        return sum(file.bytes for file in self.files)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5GB` or `500MiB`.

    Raises:
        ExportError: it is not a size of a byte or more.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    size = float(match[1]) * UNITS[match[2]] if match else 0.0
    if size < 1:
        raise ExportError(f"--shard-size {text!r} is not a size; write 5GB, or 500MB")
    return int(size)


def original_layout(source: Checkpoint) -> FileLayout:
    """Return the original's own files, header for header.

    Raises:
        ExportError: a file has bytes that belong to no tensor.
    """
    files: dict[str, list[tuple[StoredTensor, str]]] = {}
    for name, stored in source.tensors.items():
        files.setdefault(stored.file, []).append((stored, name))
    index_file = source.folder / INDEX
    index = index_file.read_bytes() if INDEX in source.weight_files else None
    return FileLayout(
        tuple(
            _original_file(source, name, files.get(name, []))
            for name in source.weight_files
            if name != INDEX
        ),
        index,
    )


def _original_file(
    source: Checkpoint, name: str, held: list[tuple[StoredTensor, str]]
) -> WeightFile:
    path = source.folder / name
    ordered = sorted(held, key=lambda pair: (pair[0].start, pair[0].stop))
    with path.open("rb") as file:
        header = file.read(read_header(path).size)
    end = len(header)
    for stored, _ in ordered:
        if stored.start != end:
            raise ExportError(f"{path} is damaged: byte {end} belongs to no tensor")
        end = stored.stop
    if end != path.stat().st_size:
        raise ExportError(
            f"{path} is damaged: its tensors end at byte {end}, the file at byte "
            f"{path.stat().st_size}"
        )
    return WeightFile(name, header, tuple(tensor for _, tensor in ordered), end)


def sharded_layout(source: Checkpoint, shard_bytes: int) -> FileLayout:
    """Return new files of at most `shard_bytes` of tensors each; no tensor is split.

    Tensors keep the order of the original's files.
    """
    order = {file: number for number, file in enumerate(source.weight_files)}
    names = sorted(
        source.tensors, key=lambda n: (order[source.tensors[n].file], source.tensors[n].start)
    )
    groups: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = source.tensors[name].bytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    if count == 1:
        return FileLayout((_new_file(source, SINGLE, groups[0]),), None)
    files = [
        _new_file(source, f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]
    return FileLayout(tuple(files), _new_index(source, files))


def _new_file(source: Checkpoint, name: str, tensors: list[str]) -> WeightFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0  # offsets count from the end of the header
    for tensor in tensors:
        stored = source.tensors[tensor]
        entries[tensor] = {
            "dtype": stored.dtype,
            "shape": stored.shape,
            "data_offsets": [end, end + stored.bytes],
        }
        end += stored.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    return WeightFile(name, header, tuple(tensors), len(header) + end)


def _new_index(source: Checkpoint, files: list[WeightFile]) -> bytes:
    """Return the index of new files, with the metadata that the original's has."""
    metadata: dict[str, object] = {}
    if (old := source.folder / INDEX).is_file():
        metadata = json.loads(old.read_text(encoding="utf-8")).get("metadata", {})
    metadata["total_size"] = sum(stored.bytes for stored in source.tensors.values())
    file_of = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": metadata, "weight_map": dict(sorted(file_of.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def choose_layout(source: Checkpoint, shard_bytes: int | None) -> FileLayout:
    """Return the original's files, or new ones of `shard_bytes` if that is given."""
    return original_layout(source) if shard_bytes is None else sharded_layout(source, shard_bytes)


def file_stats(source: Checkpoint) -> dict[str, list[int]]:
    """Return size in bytes and time of change in ns of each weight file, which tell a change."""
    files = [Path(name) for name in source.weight_files]
    stats = {name.as_posix(): (source.folder / name).stat() for name in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
