"""Whole sets of residuals: the residual stream at each prompt's last token, block by block.

`model/language_model.py` collects them; `directions/residuals/shard.py` holds them by batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.residuals.shard import ResidualShard, winsorized

ResidualValues = Float[Tensor, "prompt layer hidden"]
LayerVectors = Float[Tensor, "layer hidden"]


@dataclass(frozen=True)
class Residuals:
    """Outputs of every block at one position of each prompt, before any final norm.

    Attributes:
        values: float32 on the CPU, `"prompt layer hidden"`, prompts in the order of their set;
            `layer` i is the output of block i.
        fingerprint: The fingerprint of the prompt set.

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
        """The number of blocks of the model."""
        return self.values.shape[1]

    def mean(self) -> Float[Tensor, "layer hidden"]:
        """Return the mean over prompts, float64."""
        return self.values.double().mean(dim=0)

    def winsorized(self, quantile: float) -> "Residuals":
        """Clamp every residual at a quantile of its own magnitudes; 1 changes nothing.

        The threshold is taken per prompt and layer, over the hidden units, so the result does not
        depend on which prompts share a batch.
        """
        if quantile >= 1:
            return self
        # one layer at a time: (prompt, hidden)
        layers = [winsorized(layer, quantile) for layer in self.values.numpy().swapaxes(0, 1)]
        return type(self)(torch.from_numpy(numpy.stack(layers, axis=1)), self.fingerprint)


def join(shards: Iterable[ResidualShard], fingerprint: str = "") -> Residuals:
    """Join all shards of a set in the order of its prompts, in whatever order they arrive.

    Raises:
        ValueError: a shard is missing, or arrives twice.
    """
    ordered = sorted(shards, key=lambda shard: shard.first)
    ends = [0, *accumulate(shard.prompts for shard in ordered)]
    if [shard.first for shard in ordered] != ends[:-1]:
        spans = ", ".join(f"{shard.first} + {shard.prompts}" for shard in ordered)
        raise ValueError(f"residual shards ({spans}) don't hold each prompt once")
    values = numpy.concatenate([shard.values() for shard in ordered])
    return Residuals(torch.from_numpy(values), fingerprint)
