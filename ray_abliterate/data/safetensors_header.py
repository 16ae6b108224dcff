"""Read the header of a safetensors file: which tensors it holds, and where their bytes lie.

A file is 8 bytes that say how long the header is (little-endian), the header as JSON, and the
tensors' bytes one after the other (https://github.com/huggingface/safetensors#format). Knows
nothing about torch or models.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: The tensor's type as the format spells it, such as `BF16`.
        shape: The tensor's shape.
        start: Offset of its first byte from the beginning of the file.
        stop: Offset of the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The part of a file before its tensors.

    Attributes:
        metadata: Texts by name; empty if the file has none.
        tensors: Entries by the tensor's name, in the file's order.
        size: Bytes before the first tensor, including the 8 bytes of the length.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    size: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read the header of a file.

    Raises:
        ValueError: the file is damaged; the message completes "… is damaged: …".
    """
    with path.open("rb") as stream:
        return _parse(stream, path.stat().st_size)


def parse_header(data: bytes) -> SafetensorsHeader:
    """Read the header of a file that is in memory.

    Raises:
        ValueError: the data is damaged, as for `read_header`.
    """
    return _parse(io.BytesIO(data), len(data))


def _parse(stream: BinaryIO, file_size: int) -> SafetensorsHeader:
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    size = LENGTH_BYTES + length
    if size > file_size:
        raise ValueError("its header is cut off")
    try:
        header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {
            name: TensorEntry(
                entry["dtype"],
                tuple(entry["shape"]),
                size + entry["data_offsets"][0],
                size + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"its header is not readable ({error!r})") from None
    return SafetensorsHeader(metadata, tensors, size)
