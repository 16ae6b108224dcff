"""One writer of a model in memory: written to in place, or edited by a hook where it can't be.

Both kinds are `planned_edits.EditTarget`s. Knows nothing about plans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.ablation.edit import Edit, Projections, compute_projections
from ray_abliterate.ablation.layer_hooks import (
    EditSelector,
    LayerHook,
    SingleEdit,
    bias_of,
    fan_in_of,
    matrix_of,
)
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer, hidden_size, oriented, post_norm_gain
from ray_abliterate.model.devices import device_of
from ray_abliterate.recipe import Norm

EDITABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that an edit can be rounded to."""


@dataclass(frozen=True)
class InPlaceWriter:
    """A writer whose weights are overwritten: the live tensors and their pristine copies.

    Attributes:
        writer: Its place in the model.
        owner: The module that the weight belongs to.
        weight: The live weight, in the model's own orientation.
        pristine: A copy of it from before any edit, on whatever device.
        bias: The live bias, if there is one.
        pristine_bias: A copy of it from before any edit.
        gain: Effective weight of the norms after the writer, `"hidden"`, if there are any.
    """

    writer: Writer
    owner: nn.Module
    weight: Tensor
    pristine: Tensor
    bias: Tensor | None
    pristine_bias: Tensor | None
    gain: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of experts, the hidden size, and the fan-in."""
        experts, hidden, fan_in = oriented(self.pristine, self.writer).shape
        return experts, hidden, fan_in

    @property
    def device(self) -> torch.device:
        """The device that its projections are computed on."""
        return self.weight.device

    @property
    def stacks_experts(self) -> bool:
        """Whether it is a stack of experts, and not the weight of a linear layer."""
        return self.weight.ndim != 2 or not self.writer.parameter.endswith(".weight")

    def project(self, rows: Tensor, norm: Norm) -> Projections:
        """Return the products of its pristine weights with vectors, `"row hidden"`."""
        pristine = oriented(self.pristine, self.writer).to(self.device)
        return compute_projections(pristine, rows, norm)

    def add_hook(self, selector: EditSelector, on_change: Callable[[], None]) -> LayerHook:
        """Hook its layer, so that it can be edited without writing to its weights.

        Raises:
            ModelError: it stacks experts.
        """
        if self.stacks_experts:
            raise ModelError(f"{self.writer.parameter} is not the weight of a linear layer")
        return LayerHook(self.owner, self.weight.dtype, self.bias, selector, on_change)

    @torch.no_grad()
    def apply(self, edit: Edit) -> None:
        """Write the edit into the weights, and into the bias if there is one."""
        edit.apply_(oriented(self.weight, self.writer), oriented(self.pristine, self.writer))
        if self.bias is not None and self.pristine_bias is not None:
            edit.apply_to_bias_(self.bias, self.pristine_bias)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the pristine bits back into the weights and the bias."""
        self.weight.copy_(self.pristine, non_blocking=True)
        if self.bias is not None and self.pristine_bias is not None:
            self.bias.copy_(self.pristine_bias, non_blocking=True)

    def differs(self) -> bool:
        """Return whether the weight's bits differ from the pristine ones now."""
        return not torch.equal(self.weight, self.pristine.to(self.weight.device))


class HookedWriter:
    """A writer that can't be written to: a linear layer that is edited by a hook.

    Its weights are quantized or offloaded, so the matrix is read off the layer's outputs. The
    attributes are those of `planned_edits.EditTarget`.
    """

    stacks_experts = False

    def __init__(self, model: Any, writer: Writer, on_change: Callable[[], None]) -> None:
        """Hook the writer's layer.

        Args:
            model: The transformers model.
            writer: The writer's place in it.
            on_change: Is called after the edit was applied or undone.

        Raises:
            ModelError: the writer is not the weight of a linear layer (stacked experts).
        """
        self.writer = writer
        self._linear = model.get_submodule(writer.parameter.rpartition(".")[0])
        self._dtype = model.get_input_embeddings().weight.dtype
        self._fan_in = fan_in_of(self._linear, writer.parameter)
        self.device = device_of(self._linear)
        self._bias = bias_of(self._linear, self._fan_in, self._dtype, self.device)
        self.gain = post_norm_gain(model, writer, self.device)
        self.shape = (1, hidden_size(model), self._fan_in)  # one expert
        self._hook = self.add_hook(SingleEdit(), on_change)
        self._edit: Edit | None = None

    def project(self, rows: Tensor, norm: Norm) -> Projections:
        """Return the products of its matrix with vectors, `"row hidden"`."""
        matrix = matrix_of(self._linear, self._fan_in, self._dtype, self.device)
        return compute_projections(matrix[None], rows, norm)  # (expert = 1, hidden, fan_in)

    def add_hook(self, selector: EditSelector, on_change: Callable[[], None]) -> LayerHook:
        """Add one more hook to its layer, as `InPlaceWriter.add_hook` does."""
        return LayerHook(self._linear, self._dtype, self._bias, selector, on_change)

    def apply(self, edit: Edit) -> None:
        """Let the hook apply the edit from now on."""
        self._hook.set_edits({0: edit}, 1)
        self._edit = edit

    def restore(self) -> None:
        """Let the layer compute with its own weights again."""
        self._hook.clear_edits()
        self._edit = None

    def differs(self) -> bool:
        """Return whether the edit shows above the rounding of the layer's output."""
        edit, least = self._edit, torch.finfo(self._dtype).eps
        return edit is not None and abs(edit.strength) > least and bool(edit.b.any())


def is_writable(model: nn.Module, writer: Writer) -> bool:
    """Return whether a writer's numbers are floats in memory that the layer multiplies by."""
    owner, _, name = writer.parameter.rpartition(".")
    weight = getattr(model.get_submodule(owner), name, None)
    if type(weight) is not nn.Parameter or weight.is_meta:
        return False
    return weight.dtype in EDITABLE
