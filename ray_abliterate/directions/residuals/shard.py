"""Residual shards: the residuals of one fixed batch of prompts, as an Arrow record batch.

Knows Arrow and numpy, and nothing about models, torch or Ray: a process that reduces a shard where
it lies has little to load (Arrow's own conversions from and to numpy would load pandas). Sums are
float64 and are added in the order of the shards, so that they have the same bits whoever made the
shards, and wherever they were.
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
    """Raised where a file is not the shard that was written."""


@dataclass(frozen=True)
class ResidualShard:
    """Residuals of consecutive prompts of one set: a view of a record batch, one row per prompt.

    Columns: `prompt` (the prompt's index in its set), `set`, and `layer-0`, `layer-1`, …, each of
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
        """Build the shard of a prompt set that begins with prompt `first`.

        Args:
            name: The prompt set's name.
            first: Index of the first prompt in its set.
            values: The residuals.
            dtype: `float32` or `float16`, in which they are stored.

        Raises:
            ModelError: a value is not finite, or too large for `dtype`; names prompt and layer.
        """
        values = numpy.asarray(values, numpy.float32)
        _refuse_infinite(
            values, first, "is not finite; float16 overflows in some models: "
            "set model.dtype to bfloat16 or float32",
        )  # fmt: skip
        with numpy.errstate(over="ignore"):
            stored = values.astype(dtype)
        _refuse_infinite(stored, first, f"is too large for {dtype}; set direction.residual_dtype")
        count, layers, hidden = stored.shape
        columns = {
            "prompt": _arrow_array(numpy.arange(first, first + count, dtype=numpy.int32)),
            "set": _repeated_string(name, count),
        }
        for layer in range(layers):
            flat = _arrow_array(numpy.ascontiguousarray(stored[:, layer]).reshape(-1))
            columns[f"layer-{layer}"] = pyarrow.FixedSizeListArray.from_arrays(flat, hidden)
        return cls(pyarrow.record_batch(columns))

    @property
    def name(self) -> str:
        """The name of the prompt set."""
        return str(self.batch.column("set")[0].as_py())

    @property
    def first(self) -> int:
        """The index of the first prompt in its set."""
        return int(self.batch.column("prompt")[0].as_py())

    @property
    def prompts(self) -> int:
        """The number of prompts in the shard."""
        return int(self.batch.num_rows)

    @property
    def layers(self) -> int:
        """The number of columns of layers."""
        return int(self.batch.num_columns) - 2

    def layer(self, index: int) -> LayerValues:
        """Return one layer as a read-only view, in the shard's own dtype."""
        column = self.batch.column(f"layer-{index}")
        view: LayerValues = numpy.from_dlpack(column.flatten()).reshape(len(column), -1)
        return view

    def values(self) -> ShardValues:
        """Return a copy of all layers, in float32."""
        layers = [self.layer(index) for index in range(self.layers)]
        return numpy.stack(layers, axis=1).astype(numpy.float32, copy=False)

    def to_file(self, key: str) -> bytes:
        """Serialise the shard as an Arrow IPC file, with its key and a checksum of key and values.

        Args:
            key: The content key that the residuals were computed for; see `content_key`.
        """
        facts = {"key": key, "sha256": self._checksum(key.encode())}
        batch, sink = self.batch.replace_schema_metadata(facts), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    @classmethod
    def from_file(cls, data: Any, key: str | None = None) -> "ResidualShard | None":
        """Parse `to_file`'s output, bit for bit; return None if it was written for another key.

        Args:
            data: The file's bytes, or an Arrow buffer that maps them; values are views of it.
            key: The content key to expect; None accepts any.

        Raises:
            DamagedShard: the bytes are not those that were written.
        """
        try:
            batch = pyarrow.ipc.open_file(pyarrow.py_buffer(data)).get_batch(0)
            batch.validate(full=True)
            facts, shard = batch.schema.metadata, cls(batch.replace_schema_metadata(None))
            written = facts[b"key"]
            intact = facts[b"sha256"] == shard._checksum(written).encode()
        except _UNREADABLE as error:
            raise DamagedShard(
                f"it is not an Arrow file of a shard ({type(error).__name__})"
            ) from None
        if not intact:
            raise DamagedShard("its checksum is not the one that it was written with")
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
"""What reading an Arrow file may raise once its bytes have changed."""


def content_key(**facts: Any) -> str:
    """Return the SHA-256 of all facts that decide what residuals are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def winsorized(values: LayerValues, quantile: float) -> LayerValues:
    """Clamp every residual of a layer at a quantile of its own magnitudes, in float32."""
    values = values.astype(numpy.float32, copy=False)
    if quantile >= 1:
        return values
    limit = numpy.quantile(numpy.abs(values), quantile, axis=-1, keepdims=True)
    limit = numpy.asarray(limit, numpy.float32)
    clamped: LayerValues = numpy.clip(values, -limit, limit)
    return clamped


@dataclass(frozen=True)
class Sums:
    """The number of prompts and the sum of their residuals; `+` adds those of another shard."""

    prompts: int
    totals: Float[numpy.ndarray, "layer hidden"]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.prompts + other.prompts, self.totals + other.totals)

    @property
    def mean(self) -> Float[numpy.ndarray, "layer hidden"]:
        """The mean over prompts, float64."""
        return self.totals / self.prompts


def sums_of(batch: Any, quantile: float = 1.0, columns: range | None = None) -> Sums:
    """Sum one shard over its prompts, in float64.

    Args:
        batch: The shard's record batch.
        quantile: At which each residual is winsorised first; 1 changes nothing.
        columns: The columns of layers to read; all if None.
    """
    shard = ResidualShard(batch)
    totals = [
        winsorized(shard.layer(index), quantile).sum(axis=0, dtype=numpy.float64)
        for index in (range(shard.layers) if columns is None else columns)
    ]
    return Sums(shard.prompts, numpy.stack(totals))


def _arrow_array(values: FlatArray) -> Any:
    """View a numpy array as an Arrow array, without a copy."""
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, values.size, [None, pyarrow.py_buffer(values)])


def _repeated_string(text: str, count: int) -> Any:
    """Return an Arrow array that holds one string `count` times."""
    data = text.encode()
    ends = pyarrow.py_buffer(numpy.arange(count + 1, dtype=numpy.int32) * numpy.int32(len(data)))
    buffers = [None, ends, pyarrow.py_buffer(data * count)]
    return pyarrow.Array.from_buffers(pyarrow.string(), count, buffers)


def _refuse_infinite(values: ShardValues, first: int, problem: str) -> None:
    broken = ~numpy.isfinite(values).all(axis=-1)
    if broken.any():
        prompt, layer = numpy.argwhere(broken)[0].tolist()
        raise ModelError(f"the residual of prompt {first + prompt} after layer {layer} {problem}")
