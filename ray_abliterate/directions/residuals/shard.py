"""Residual shards: the residuals of one fixed batch of prompts, as an Arrow record batch.

Knows Arrow and numpy, and nothing about models, torch or Ray: a process that reduces a shard where
it lies has little to load (Arrow's own ways from and to numpy would load pandas). Sums are float64
and are added in the order of the shards, so that they have the same bits whoever made the shards,
and wherever they were.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
from jaxtyping import Float, Shaped

from ray_abliterate.errors import ModelError

ShardValues = Float[numpy.ndarray, "prompt layer hidden"]
FlatArray = Shaped[numpy.ndarray, " number"]
LayerValues = Float[numpy.ndarray, "prompt hidden"]


class DamagedShard(Exception):
    """A file is not the shard that was written."""


@dataclass(frozen=True)
class ResidualShard:
    """Residuals of consecutive prompts of one set: a view of a record batch, one row a prompt.

    Columns: `prompt` (the prompt's place in its set), `set`, and `layer-0`, `layer-1`, …, each of
    fixed-size lists in float32 or float16, so that a layer is read alone, and without a copy. What
    components add to the stream comes after the stream itself: all layers of the first component,
    then of the next. Of several token positions, all of that at the last one comes first, then all
    at the one before.
    """

    batch: Any

    @classmethod
    def of(
        cls, name: str, first: int, values: ShardValues, dtype: str = "float32"
    ) -> "ResidualShard":
        """The shard of a prompt set that begins with prompt `first`.

        Raises:
            ModelError: a value is not finite, or not in `dtype`; names prompt and layer.
        """
        values = numpy.asarray(values, numpy.float32)
        _refuse_infinite(
            values, first, "is not finite; float16 overflows in some models: "
            "set model.dtype to bfloat16 or float32",
        )  # fmt: skip
        with numpy.errstate(over="ignore"):
            kept = values.astype(dtype)
        _refuse_infinite(kept, first, f"is too large for {dtype}; set direction.residual_dtype")
        count, layers, hidden = kept.shape
        columns = {
            "prompt": _array(numpy.arange(first, first + count, dtype=numpy.int32)),
            "set": _repeated(name, count),
        }
        for layer in range(layers):
            flat = _array(numpy.ascontiguousarray(kept[:, layer]).reshape(-1))
            columns[f"layer-{layer}"] = pyarrow.FixedSizeListArray.from_arrays(flat, hidden)
        return cls(pyarrow.record_batch(columns))

    @property
    def name(self) -> str:
        """The prompt set."""
        return str(self.batch.column("set")[0].as_py())

    @property
    def first(self) -> int:
        """The first prompt's place in its set."""
        return int(self.batch.column("prompt")[0].as_py())

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return int(self.batch.num_rows)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.batch.num_columns) - 2

    def layer(self, index: int) -> LayerValues:
        """One layer, in the shard's own dtype: a read-only view."""
        column = self.batch.column(f"layer-{index}")
        view: LayerValues = numpy.from_dlpack(column.flatten()).reshape(len(column), -1)
        return view

    def values(self) -> ShardValues:
        """All layers, float32, copied."""
        layers = [self.layer(index) for index in range(self.layers)]
        return numpy.stack(layers, axis=1).astype(numpy.float32, copy=False)

    def to_file(self, key: str) -> bytes:
        """An Arrow IPC file that holds its content key, and a checksum of that and all values."""
        facts = {"key": key, "sha256": self._checksum(key.encode())}
        batch, sink = self.batch.replace_schema_metadata(facts), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    @classmethod
    def from_file(cls, data: Any, key: str | None = None) -> "ResidualShard | None":
        """The inverse of `to_file`, bit for bit; None if the file was written for another key.

        Args:
            data: The file's bytes, or an Arrow buffer that maps them; values are views of it.
            key: The content key that is wanted; any, if there is none.

        Raises:
            DamagedShard: it was not written so.
        """
        try:
            batch = pyarrow.ipc.open_file(pyarrow.py_buffer(data)).get_batch(0)
            batch.validate(full=True)
            facts, shard = batch.schema.metadata, cls(batch.replace_schema_metadata(None))
            written = facts[b"key"]
            intact = facts[b"sha256"] == shard._checksum(written).encode()
        except _UNREADABLE as error:
            raise DamagedShard(f"it is no Arrow file of a shard ({type(error).__name__})") from None
        if not intact:
            raise DamagedShard("it does not have the checksum that it was written with")
        return shard if key is None or written == key.encode() else None

    def _checksum(self, key: bytes) -> str:
        facts = [str(self.batch.schema.remove_metadata()), self.batch.column("set").to_pylist()]
        digest = hashlib.sha256(key + json.dumps(facts).encode())
        digest.update(numpy.from_dlpack(self.batch.column("prompt")).tobytes())
        for index in range(self.layers):
            digest.update(self.layer(index).tobytes())
        return digest.hexdigest()


_UNREADABLE = (
    pyarrow.ArrowException, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError,
    MemoryError, OverflowError,
)  # fmt: skip
"""What reading an Arrow file can raise once its bytes are not what they were."""


def content_key(**facts: Any) -> str:
    """SHA-256 of all that decides what residuals are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def winsorized(values: LayerValues, quantile: float) -> LayerValues:
    """Every residual of a layer clamped at the quantile of its own magnitudes, in float32."""
    values = values.astype(numpy.float32, copy=False)
    if quantile >= 1:
        return values
    limit = numpy.quantile(numpy.abs(values), quantile, axis=-1, keepdims=True)
    limit = numpy.asarray(limit, numpy.float32)
    clamped: LayerValues = numpy.clip(values, -limit, limit)
    return clamped


@dataclass(frozen=True)
class Sums:
    """How many prompts, and the sum of their residuals in float64; of more shards by `+`."""

    prompts: int
    totals: Float[numpy.ndarray, "layer hidden"]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.prompts + other.prompts, self.totals + other.totals)

    @property
    def mean(self) -> Float[numpy.ndarray, "layer hidden"]:
        """Mean over prompts."""
        return self.totals / self.prompts


def sums_of(batch: Any, quantile: float = 1.0, columns: range | None = None) -> Sums:
    """The sums of one shard, every residual winsorised first (1: none is); of some columns of
    layers, all if unset."""
    shard = ResidualShard(batch)
    totals = [
        winsorized(shard.layer(index), quantile).sum(axis=0, dtype=numpy.float64)
        for index in (range(shard.layers) if columns is None else columns)
    ]
    return Sums(shard.prompts, numpy.stack(totals))


def _array(values: FlatArray) -> Any:
    """As Arrow has it, uncopied."""
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, values.size, [None, pyarrow.py_buffer(values)])


def _repeated(text: str, count: int) -> Any:
    """So many strings."""
    data = text.encode()
    ends = pyarrow.py_buffer(numpy.arange(count + 1, dtype=numpy.int32) * numpy.int32(len(data)))
    buffers = [None, ends, pyarrow.py_buffer(data * count)]
    return pyarrow.Array.from_buffers(pyarrow.string(), count, buffers)


def _refuse_infinite(values: ShardValues, first: int, what: str) -> None:
    broken = ~numpy.isfinite(values).all(axis=-1)
    if broken.any():
        prompt, layer = numpy.argwhere(broken)[0].tolist()
        raise ModelError(f"the residual of prompt {first + prompt} after layer {layer} {what}")
