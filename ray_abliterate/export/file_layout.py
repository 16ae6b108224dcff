"""The weight files of an export: their names, their headers, and where each tensor goes.

Either the original's files, header for header, or new ones of a chosen size with a new index.
Knows nothing about models or edits.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint import INDEX, SINGLE, Checkpoint, StoredTensor

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to write: the header, then the tensors' bytes in this order."""

    name: str
    header: bytes
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class FileLayout:
    """All weight files, and the text of the index file if there is one."""

    files: tuple[WeightFile, ...]
    index: bytes | None

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.bytes for file in self.files)


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MiB`.

    Raises:
        ExportError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    size = float(found[1]) * UNITS[found[2]] if found else 0.0
    if size < 1:
        raise ExportError(f"--shard-size {text!r} is not a size; write 5GB, or 500MB")
    return int(size)


def original_layout(source: Checkpoint) -> FileLayout:
    """The original's own files.

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
            _original(source, name, files.get(name, []))
            for name in source.weight_files
            if name != INDEX
        ),
        index,
    )


def _original(source: Checkpoint, name: str, held: list[tuple[StoredTensor, str]]) -> WeightFile:
    path = source.folder / name
    ordered = sorted(held, key=lambda pair: (pair[0].start, pair[0].stop))
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(8 + length)
    at = len(header)
    for stored, _ in ordered:
        if stored.start != at:
            raise ExportError(f"{path} is damaged: byte {at} belongs to no tensor")
        at = stored.stop
    if at != path.stat().st_size:
        raise ExportError(f"{path} is damaged: its tensors end at byte {at}, the file elsewhere")
    return WeightFile(name, header, tuple(tensor for _, tensor in ordered), at)


def sharded_layout(source: Checkpoint, shard_bytes: int) -> FileLayout:
    """New files of at most `shard_bytes` of tensors each (one tensor is never cut).

    Tensors keep the order of the original's files.
    """
    order = {file: number for number, file in enumerate(source.weight_files)}
    names = sorted(
        source.tensors, key=lambda n: (order[source.tensors[n].file], source.tensors[n].start)
    )
    groups: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _size(source, name)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    if count == 1:
        return FileLayout((_sharded(source, SINGLE, groups[0]),), None)
    files = [
        _sharded(source, f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]
    return FileLayout(tuple(files), _index(source, files))


def _sharded(source: Checkpoint, name: str, tensors: list[str]) -> WeightFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        stored, size = source.tensors[tensor], _size(source, tensor)
        place = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, at + size]}
        entries[tensor] = place
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    return WeightFile(name, header, tuple(tensors), len(header) + at)


def _index(source: Checkpoint, files: list[WeightFile]) -> bytes:
    """The index, with what the original's says of the whole model."""
    metadata: dict[str, object] = {}
    if (old := source.folder / INDEX).is_file():
        metadata = json.loads(old.read_text(encoding="utf-8")).get("metadata", {})
    metadata["total_size"] = sum(_size(source, name) for name in source.tensors)
    places = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _size(source: Checkpoint, name: str) -> int:
    stored = source.tensors[name]
    return stored.stop - stored.start


def layout_of(source: Checkpoint, shard_bytes: int | None) -> FileLayout:
    """The original's files, or new ones if a size is given."""
    return original_layout(source) if shard_bytes is None else sharded_layout(source, shard_bytes)


def headers_fingerprint(source: Checkpoint) -> dict[str, list[int]]:
    """What tells whether the original's files were changed: size and time of change, by file."""
    files = [Path(name) for name in source.weight_files]
    stats = {name.as_posix(): (source.folder / name).stat() for name in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
