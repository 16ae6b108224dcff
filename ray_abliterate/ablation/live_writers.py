"""One writer of a model in memory: written to, or edited beside if it can't be.

Both kinds are `planned_edits.Target`s. Knows nothing about plans.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.ablation import edit as ablation
from ray_abliterate.ablation.layer_hooks import (
    Choice,
    EditedLayer,
    OneEdit,
    bias_of,
    device_of,
    fan_in_of,
    matrix_of,
)
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer, hidden_size, oriented, post_norm_gain
from ray_abliterate.recipe import Norm

EDITABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that an edit is rounded to."""


@dataclass(frozen=True)
class OpenWriter:
    """A writer that can be written to: the live tensors, and their pristine copies."""

    writer: Writer
    owner: nn.Module
    weight: Tensor
    pristine: Tensor
    bias: Tensor | None
    pristine_bias: Tensor | None
    gain: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, hidden, fan-in."""
        experts, hidden, fan_in = oriented(self.pristine, self.writer).shape
        return experts, hidden, fan_in

    @property
    def device(self) -> torch.device:
        """Where its products are computed."""
        return self.weight.device

    def project(self, rows: Tensor, norm: Norm) -> ablation.Projections:
        """Products of its pristine weights with vectors."""
        pristine = oriented(self.pristine, self.writer).to(self.device)
        return ablation.project(pristine, rows, norm)

    def beside(self, choice: Choice) -> EditedLayer:
        """A way to edit it beside its weights."""
        if self.stacks_experts:
            raise ModelError(f"{self.writer.parameter} is not the weight of a linear layer")
        return EditedLayer(self.owner, self.weight.dtype, self.bias, choice)

    @property
    def stacks_experts(self) -> bool:
        """Whether it is no layer of its own."""
        return self.weight.ndim != 2 or not self.writer.parameter.endswith(".weight")

    @torch.no_grad()
    def apply(self, edit: ablation.Edit) -> None:
        """From now on it is as edited."""
        edit.apply_(oriented(self.weight, self.writer), oriented(self.pristine, self.writer))
        if self.bias is not None and self.pristine_bias is not None:
            edit.apply_to_bias_(self.bias, self.pristine_bias)

    @torch.no_grad()
    def restore(self) -> None:
        """As it was."""
        self.weight.copy_(self.pristine, non_blocking=True)
        if self.bias is not None and self.pristine_bias is not None:
            self.bias.copy_(self.pristine_bias, non_blocking=True)

    def differs(self) -> bool:
        """Whether its edit shows: in its bits, or above the rounding of its output."""
        return not torch.equal(self.weight, self.pristine.to(self.weight.device))


class ClosedWriter:
    """A writer that can't be written to: a linear layer, edited beside its weights."""

    stacks_experts = False

    def __init__(self, model: Any, writer: Writer) -> None:
        self.writer = writer
        self._linear = model.get_submodule(writer.parameter.rpartition(".")[0])
        self._dtype = model.get_input_embeddings().weight.dtype
        self._fan_in = fan_in_of(self._linear, writer.parameter)
        self.device = device_of(self._linear)
        self._bias = bias_of(self._linear, self._fan_in, self._dtype, self.device)
        self.gain = post_norm_gain(model, writer, self.device)
        self.shape = (1, hidden_size(model), self._fan_in)
        self._layer = self.beside(OneEdit())
        self._edit: ablation.Edit | None = None

    def project(self, rows: Tensor, norm: Norm) -> ablation.Projections:
        """Products of its pristine weights with vectors."""
        matrix = matrix_of(self._linear, self._fan_in, self._dtype, self.device)
        return ablation.project(matrix[None], rows, norm)

    def beside(self, choice: Choice) -> EditedLayer:
        """A way to edit it beside its weights."""
        return EditedLayer(self._linear, self._dtype, self._bias, choice)

    def apply(self, edit: ablation.Edit) -> None:
        """From now on it is as edited."""
        self._layer.open({0: edit}, 1)
        self._edit = edit

    def restore(self) -> None:
        """As it was."""
        self._layer.close()
        self._edit = None

    def differs(self) -> bool:
        """Whether its edit shows: in its bits, or above the rounding of its output."""
        edit, least = self._edit, torch.finfo(self._dtype).eps
        return edit is not None and abs(edit.strength) > least and bool(edit.b.any())


def can_be_written(model: nn.Module, writer: Writer) -> bool:
    """Whether a writer's numbers are floats in memory, as they are multiplied with."""
    owner, _, name = writer.parameter.rpartition(".")
    weight = getattr(model.get_submodule(owner), name, None)
    if type(weight) is not nn.Parameter or weight.is_meta:
        return False
    return weight.dtype in EDITABLE
