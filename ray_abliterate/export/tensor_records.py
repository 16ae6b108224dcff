"""Which tensors of an export differ from the base model's, and the record that identifies each.

Reads bytes of two checkpoints, a few at a time; knows nothing about models.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ray_abliterate.errors import ReproductionError
from ray_abliterate.export.checkpoint import DTYPES, Checkpoint, StoredTensor

SAMPLE = 16
"""Values of each edited tensor that are recorded, to compare with where bits may differ."""
READ_BYTES = 1 << 24
"""Bytes, or values, in memory at once."""


class BundleRecord(BaseModel):
    """Values of a file that others may have written: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WrittenTensor(BundleRecord):
    """What identifies one tensor of an export as it was written."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    norm: float
    """Of all its values, summed in float64."""
    sample: tuple[float, ...]
    """`SAMPLE` values, spread over the tensor."""


class TensorRecord(WrittenTensor):
    """What identifies one edited tensor as it was written, and as the base model has it."""

    base_sha256: str


def record_tensors(written: Checkpoint) -> dict[str, WrittenTensor]:
    """Return the record of every tensor of a checkpoint, by name."""
    return {name: WrittenTensor(**_facts(written, name)) for name in written.tensors}


def record_edited_tensors(source: Checkpoint, written: Checkpoint) -> dict[str, TensorRecord]:
    """Return the records of the tensors whose bytes are not the base model's, by name.

    Reads both models once.

    Raises:
        ReproductionError: a tensor is missing, is not in the base model, or has another shape or
            dtype.
    """
    if source.tensors.keys() != written.tensors.keys():
        names = sorted(source.tensors.keys() ^ written.tensors.keys())
        raise ReproductionError(
            f"{names[0]} and {len(names) - 1} more tensors are in only one of {source.folder} and "
            f"{written.folder}."
        )
    return {
        name: TensorRecord(
            **_facts(written, name), base_sha256=_sha256(_bytes(source, source.tensors[name]))
        )
        for name in source.tensors
        if _differ(source, written, name)
    }


def _differ(source: Checkpoint, written: Checkpoint, name: str) -> bool:
    ours, theirs = written.tensors[name], source.tensors[name]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        raise ReproductionError(
            f"{name} is {ours.dtype} {list(ours.shape)} in {written.folder}, but {theirs.dtype} "
            f"{list(theirs.shape)} in the base model."
        )
    pairs = zip(_bytes(source, theirs), _bytes(written, ours), strict=True)
    return any(a != b for a, b in pairs)


def _facts(written: Checkpoint, name: str) -> dict[str, Any]:
    """Return the fields of a tensor's record."""
    stored = written.tensors[name]
    values = _values(written, stored)
    step = -(-values.numel() // SAMPLE) | 1  # odd: an even step could stay in few columns
    parts = torch.split(values, READ_BYTES)  # type: ignore[no-untyped-call]
    squares = sum(float(part.double().square().sum()) for part in parts)
    return {
        "dtype": stored.dtype,
        "shape": stored.shape,
        "sha256": _sha256(_bytes(written, stored)),
        "norm": squares**0.5,
        "sample": tuple(values[::step].double().tolist()),
    }


def _values(checkpoint: Checkpoint, stored: StoredTensor) -> Tensor:
    """Read all values of a tensor, flat, in the stored dtype."""
    data = bytearray()
    for part in _bytes(checkpoint, stored):
        data += part
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype])


def tensor_sha256(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the SHA-256 of a tensor's bytes in hex; None if there is no such tensor."""
    stored = checkpoint.tensors.get(name)
    return None if stored is None else _sha256(_bytes(checkpoint, stored))


def _bytes(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[bytes]:
    """Yield a tensor's bytes, `READ_BYTES` at a time."""
    path, position = checkpoint.folder / stored.file, stored.start
    with path.open("rb") as file:
        file.seek(position)
        while position < stored.stop:
            part = file.read(min(READ_BYTES, stored.stop - position))
            if not part:
                raise ReproductionError(f"{path} is damaged: it ends before its tensors do.")
            position += len(part)
            yield part


def _sha256(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
