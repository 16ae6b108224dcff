"""Residuals: what the residual stream holds at each prompt's last token, block by block.

Values only; `model.py` collects them. Sums are done in float64, because float32 sums depend on
how the prompts were split over replicas.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ResidualValues = Float[Tensor, "prompt layer hidden"]
LayerVectors = Float[Tensor, "layer hidden"]


@dataclass(frozen=True)
class Residuals:
    """Outputs of every block at one position per prompt, before any final norm.

    Attributes:
        values: float32 on the CPU, `"prompt layer hidden"`, prompts in the order of their set;
            `layer` i is the output of block i.
        fingerprint: The prompt set's.

    Raises:
        ValueError: a value is not finite; the message names prompt and layer.
    """

    values: ResidualValues
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.values.device.type != "cpu":
            raise ValueError(f"residuals must be float32 on the CPU, not {self.values.dtype}")
        broken = ~torch.isfinite(self.values).all(dim=-1)
        if broken.any():
            prompt, layer = broken.nonzero()[0].tolist()
            raise ValueError(
                f"the residual of prompt {prompt} after layer {layer} is not finite; "
                "float16 overflows in some models: set model.dtype to bfloat16 or float32"
            )

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.values.shape[1]

    def mean(self) -> Float[Tensor, "layer hidden"]:
        """Mean over prompts, float64."""
        return self.values.double().mean(dim=0)

    def winsorized(self, quantile: float) -> "Residuals":
        """Every residual clamped at the quantile of its own magnitudes (1 changes nothing).

        The threshold is taken per prompt and layer, over the hidden units, so the result does not
        depend on which prompts share a batch.
        """
        if quantile >= 1:
            return self
        limit = torch.quantile(self.values.abs(), quantile, dim=-1, keepdim=True)
        return type(self)(self.values.clamp(-limit, limit), self.fingerprint)

    def to_arrow(self) -> bytes:
        """An Arrow IPC file: one row a prompt, the residual as a flat fixed-size list."""
        import pyarrow

        _, layers, hidden = self.values.shape
        flat = pyarrow.array(self.values.contiguous().numpy().reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(flat, layers * hidden)
        schema = pyarrow.schema(
            [("residual", column.type)],
            metadata={
                "layers": str(layers),
                "hidden": str(hidden),
                "fingerprint": self.fingerprint,
            },
        )
        sink = io.BytesIO()
        with pyarrow.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pyarrow.record_batch([column], schema=schema))
        return sink.getvalue()

    @classmethod
    def from_arrow(cls, data: bytes) -> "Residuals":
        """The inverse of `to_arrow`, bit for bit."""
        import pyarrow

        table = pyarrow.ipc.open_file(data).read_all()
        facts = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        flat = table.column("residual").combine_chunks().flatten().to_numpy()
        shape = (len(table), int(facts["layers"]), int(facts["hidden"]))
        return cls(torch.from_numpy(flat.copy()).reshape(shape), facts["fingerprint"])


@dataclass(frozen=True)
class ResidualShard:
    """Residuals of one fixed batch of prompts, and the batch's number."""

    index: int
    values: ResidualValues


def join(shards: Iterable[ResidualShard], fingerprint: str = "") -> Residuals:
    """All shards in order of their numbers, whatever the order they arrive in.

    Raises:
        ValueError: a shard is missing or there twice.
    """
    ordered = sorted(shards, key=lambda shard: shard.index)
    numbers = [shard.index for shard in ordered]
    if numbers != list(range(len(numbers))):
        raise ValueError(f"residual shards {numbers} are not 0 to {len(numbers) - 1}, each once")
    return Residuals(torch.cat([shard.values for shard in ordered]), fingerprint)
