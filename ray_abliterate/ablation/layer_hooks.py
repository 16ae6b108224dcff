"""Hooks that edit a linear layer without writing to its weights: they change its output instead.

The output of a linear layer under the edit W' = diag(s) (W + Σ a_r b_rᵀ) diag(c) is

    y = s ⊙ (W (c ⊙ x) + Σ a_r b_rᵀ(c ⊙ x))

so nothing needs to be written to W, whose numbers may be quantized, or offloaded. In half precision
y is rounded once more than with edited weights. Knows nothing about plans.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.errors import ModelError

PROBED_FEATURES = 4096
"""Input features whose columns are read off a layer at once."""


@runtime_checkable
class EditSelector(Protocol):
    """Says which of the active edits each token of a pass is computed with."""

    @property
    def active(self) -> bool:
        """Whether the tokens of this pass are edited at all."""

    def select_rows(self, values: Float[Tensor, "edit width"]) -> Tensor:
        """Return the row of each token's edit, `"token width"`, or one row for all tokens."""

    def mask_products(self, products: Float[Tensor, "token edit_rank"], rank: int) -> Tensor:
        """Return the products with the directions of each token's own edit; the others become 0."""


class SingleEdit:
    """An `EditSelector` of a single edit, number 0, which every token has."""

    active = True

    def select_rows(self, values: Tensor) -> Tensor:
        """Return the only row, `"width"`."""
        return values[0]

    def mask_products(self, products: Tensor, rank: int) -> Tensor:
        """Return the products unchanged, since there is no other edit."""
        return products


@dataclass(frozen=True)
class _StackedEdits:
    """The edits of one layer as tensors: `rank` rows of a and b for each, one row of the rest.

    Rows of edits that leave the layer alone are neutral: zeros in a and b, ones in s and c.

    Attributes:
        rank: Directions of each edit, filled up with zeros to the largest rank.
        a: `"edit_rank hidden"`.
        b: `"edit_rank fan_in"`.
        s: Row scales, `"edit hidden"`, or None for ones.
        c: Column scales, `"edit fan_in"`, or None for ones.
        bias: Edited biases, `"edit hidden"`, where the layer has a bias.
    """

    rank: int
    a: Tensor
    b: Tensor
    s: Tensor | None
    c: Tensor | None
    bias: Tensor | None


class LayerHook:
    """A pair of hooks on one linear layer; without edits the layer computes as it always did.

    A recorded CUDA graph holds the tensors of the edits it was recorded with, so whoever records
    graphs has to hear of every change.
    """

    def __init__(
        self,
        linear: nn.Module,
        dtype: torch.dtype,
        bias: Tensor | None,
        selector: EditSelector,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Install the hooks.

        Args:
            linear: The layer.
            dtype: The dtype that it computes in.
            bias: Its bias, `"hidden"`, if it has one.
            selector: Says which edit each token has.
            on_change: Is called after the edits were set or cleared.
        """
        self._dtype, self._bias, self._selector = dtype, bias, selector
        self._on_change = on_change
        self._stacked: _StackedEdits | None = None
        linear.register_forward_pre_hook(self._scale_input)
        linear.register_forward_hook(self._edit_output)

    def set_edits(self, edits: Mapping[int, Edit], count: int) -> None:
        """Apply edits from now on.

        Args:
            edits: The edits by number; the layer's rank is that of the largest.
            count: How many numbers there are. Those without an edit leave the layer alone.
        """
        self._stacked = _stack(edits, count, self._dtype, self._bias)
        self._changed()

    def clear_edits(self) -> None:
        """Let the layer compute as it did without edits."""
        self._stacked = None
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def _scale_input(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        stacked = self._stacked
        if stacked is None or stacked.c is None or not self._selector.active:
            return None
        return (args[0] * self._selector.select_rows(stacked.c), *args[1:])  # c ⊙ x

    def _edit_output(self, _module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        stacked = self._stacked
        if stacked is None or not self._selector.active:
            return None
        # x: (token, fan_in), scaled by c already; y: (token, hidden)
        x, y = args[0].flatten(0, -2).to(self._dtype), output.flatten(0, -2)
        if stacked.bias is not None and self._bias is not None:
            y = y - self._bias  # s scales W's output, not the bias
        products = self._selector.mask_products(x @ stacked.b.T, stacked.rank)  # (token, edit_rank)
        y = torch.addmm(y, products, stacked.a)
        if stacked.s is not None:
            y = y * self._selector.select_rows(stacked.s)
        if stacked.bias is not None:
            y = y + self._selector.select_rows(stacked.bias)
        return y.view_as(output)


def _stack(
    edits: Mapping[int, Edit], count: int, dtype: torch.dtype, bias: Tensor | None
) -> _StackedEdits:
    """Return edits by number as rows of tensors; see `LayerHook.set_edits`."""
    first = next(iter(edits.values()))
    rank, device = max(edit.a.shape[1] for edit in edits.values()), first.a.device

    def stack_factors(factors: Mapping[int, Tensor], width: int) -> Tensor:
        # zeros add nothing: (edit, rank, width) -> (edit * rank, width)
        stacked = torch.zeros(count, rank, width, dtype=torch.float32, device=device)
        for number, factor in factors.items():
            stacked[number, : factor.shape[1]] = factor[0]  # a linear layer is one expert
        return stacked.flatten(0, 1).to(dtype)

    def stack_scales(scales: Mapping[int, Tensor | None], width: int) -> Tensor | None:
        if all(scale is None for scale in scales.values()):
            return None
        stacked = torch.ones(count, width, dtype=torch.float32, device=device)
        for number, scale in scales.items():
            if scale is not None:
                stacked[number] = scale[0]
        return stacked.to(dtype)

    edited_bias = None
    if bias is not None:
        edited_bias = bias.detach().repeat(count, 1)  # (edit, hidden)
        for number, edit in edits.items():
            edit.apply_to_bias_(edited_bias[number], bias)
    hidden, fan_in = first.a.shape[-1], first.b.shape[-1]
    return _StackedEdits(
        rank,
        stack_factors({number: edit.a for number, edit in edits.items()}, hidden),
        stack_factors({number: edit.b for number, edit in edits.items()}, fan_in),
        stack_scales({number: edit.s for number, edit in edits.items()}, hidden),
        stack_scales({number: edit.c for number, edit in edits.items()}, fan_in),
        edited_bias,
    )


# Layers whose stored numbers are no matrix: W is read off what they answer


def fan_in_of(linear: nn.Module, parameter: str) -> int:
    """Return the number of input features of a layer.

    Args:
        linear: The layer.
        parameter: The dotted name of its weight, for the error.

    Raises:
        ModelError: it is not a linear layer.
    """
    for name in ("in_features", "nx"):  # Linear, and transformers' Conv1D
        if parameter.endswith(".weight") and isinstance(getattr(linear, name, None), int):
            return int(getattr(linear, name))
    raise ModelError(
        f"{parameter} is quantized or offloaded, and not the weight of a linear layer "
        f"(it belongs to {type(linear).__name__}: stacked experts?).\n"
        "  It can be neither written to nor edited by a hook. Leave out model.quantization, or "
        "give the\n  model more memory (model.max_memory, model.gpus_per_replica)."
    )


@torch.no_grad()
def matrix_of(
    linear: Any, fan_in: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "hidden fan_in"]:
    """Return the matrix W that a layer multiplies by, in float32: its outputs for unit vectors.

    It works for any quantization and any offloading, and is exact but for the rounding of the
    layer's output.

    Args:
        linear: The layer; it is called.
        fan_in: Its input features.
        dtype: The dtype of its inputs.
        device: The device that it computes on.
    """
    bias, columns = linear.bias, []
    linear.bias = None
    try:
        for first in range(0, fan_in, PROBED_FEATURES):
            count = min(PROBED_FEATURES, fan_in - first)
            unit = torch.zeros(count, fan_in, dtype=dtype, device=device)
            unit[torch.arange(count), torch.arange(first, first + count)] = 1
            columns.append(linear(unit).float().T)  # (hidden, count)
    finally:
        linear.bias = bias
    return torch.cat(columns, dim=1).contiguous()


@torch.no_grad()
def bias_of(linear: Any, fan_in: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return a layer's bias, `"hidden"`, which is its output for zeros; None if it has none.

    The arguments are those of `matrix_of`.
    """
    if linear.bias is None:
        return None
    output: Tensor = linear(torch.zeros(1, fan_in, dtype=dtype, device=device))[0]
    return output.clone()
