"""Edits beside a layer's weights: its output becomes what edited weights would give.

The output of a linear layer under the edit W' = diag(s) (W + Σ a_r b_rᵀ) diag(c) is

    y = s ⊙ (W (c ⊙ x) + Σ a_r b_rᵀ(c ⊙ x))

so nothing needs to be written to W, whose numbers may be quantized, or not in memory. In half
precision y is rounded once more than with edited weights. Knows nothing about plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.errors import ModelError

PROBES = 4096
"""Input features that are read off a layer at once."""


@runtime_checkable
class Choice(Protocol):
    """Which edit each token of a pass has, of those that are open."""

    @property
    def made(self) -> bool:
        """Whether tokens have edits now."""

    def rows(self, values: Float[Tensor, "edit width"]) -> Tensor:
        """Each token's own row, or one for all of them."""

    def own(self, products: Float[Tensor, "token edit_rank"], rank: int) -> Tensor:
        """The products with the directions of each token's own edit; the others' are 0."""


class OneEdit:
    """Every token has edit 0."""

    made = True

    def rows(self, values: Tensor) -> Tensor:
        """See `Choice`."""
        return values[0]

    def own(self, products: Tensor, rank: int) -> Tensor:
        """See `Choice`."""
        return products


@dataclass(frozen=True)
class _Stacked:
    """The edits of one layer, `rank` rows each of a and b, one of the rest.

    Rows of edits that leave it alone change nothing.
    """

    rank: int
    a: Tensor
    b: Tensor
    s: Tensor | None
    c: Tensor | None
    bias: Tensor | None
    """The edited biases, where the layer has one."""


class EditedLayer:
    """A linear layer that can be edited beside its weights; until it is, nothing changes."""

    changes: ClassVar[int] = 0
    """Times that any layer's edits were opened or closed, in this process."""

    def __init__(
        self, linear: nn.Module, dtype: torch.dtype, bias: Tensor | None, choice: Choice
    ) -> None:
        """Install the hooks.

        Args:
            linear: The layer.
            dtype: What it computes in.
            bias: What it adds, if it does.
            choice: Which edit is whose.
        """
        self._dtype, self._bias, self._choice = dtype, bias, choice
        self._stacked: _Stacked | None = None
        linear.register_forward_pre_hook(self._before)
        linear.register_forward_hook(self._after)

    def open(self, edits: Mapping[int, Edit], count: int) -> None:
        """Apply edits from now on, by number; of `count` numbers those that are missing leave the
        layer alone."""
        self._stacked = _stack(edits, count, self._dtype, self._bias)
        EditedLayer.changes += 1

    def close(self) -> None:
        """The layer is as it was."""
        self._stacked = None
        EditedLayer.changes += 1

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        stacked = self._stacked
        if stacked is None or stacked.c is None or not self._choice.made:
            return None
        return (args[0] * self._choice.rows(stacked.c), *args[1:])

    def _after(self, _module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        stacked = self._stacked
        if stacked is None or not self._choice.made:
            return None
        x, y = args[0].flatten(0, -2).to(self._dtype), output.flatten(0, -2)
        if stacked.bias is not None and self._bias is not None:
            y = y - self._bias
        y = torch.addmm(y, self._choice.own(x @ stacked.b.T, stacked.rank), stacked.a)
        if stacked.s is not None:
            y = y * self._choice.rows(stacked.s)
        if stacked.bias is not None:
            y = y + self._choice.rows(stacked.bias)
        return y.view_as(output)


def _stack(
    edits: Mapping[int, Edit], count: int, dtype: torch.dtype, bias: Tensor | None
) -> _Stacked:
    """Edits by number as rows of tensors."""
    some = next(iter(edits.values()))
    rank, device = max(edit.a.shape[1] for edit in edits.values()), some.a.device

    def low_rank(name: str, width: int) -> Tensor:
        stacked = torch.zeros(count, rank, width, dtype=torch.float32, device=device)
        for number, edit in edits.items():
            value = getattr(edit, name)[0]
            stacked[number, : len(value)] = value
        return stacked.flatten(0, 1).to(dtype)

    def rows(name: str, width: int) -> Tensor | None:
        if all(getattr(edit, name) is None for edit in edits.values()):
            return None
        stacked = torch.ones(count, width, dtype=torch.float32, device=device)
        for number, edit in edits.items():
            value = getattr(edit, name)
            if value is not None:
                stacked[number] = value[0]
        return stacked.to(dtype)

    new_bias = None
    if bias is not None:
        new_bias = bias.detach().repeat(count, 1)
        for number, edit in edits.items():
            edit.apply_to_bias_(new_bias[number], bias)
    hidden, fan_in = some.a.shape[-1], some.b.shape[-1]
    return _Stacked(
        rank,
        low_rank("a", hidden),
        low_rank("b", fan_in),
        rows("s", hidden),
        rows("c", fan_in),
        new_bias,
    )


# Layers whose weights can't be looked at: what they are is seen in what they do


def fan_in_of(linear: nn.Module, parameter: str) -> int:
    """Input features of a layer.

    Raises:
        ModelError: it is not a linear layer.
    """
    for name in ("in_features", "nx"):
        if parameter.endswith(".weight") and isinstance(getattr(linear, name, None), int):
            return int(getattr(linear, name))
    raise ModelError(
        f"{parameter} is quantized or offloaded, and not the weight of a linear layer "
        f"(it belongs to {type(linear).__name__}: stacked experts?).\n"
        "  It can't be written to, nor edited beside. Leave out model.quantization, or give the "
        "model\n  memory enough (model.max_memory, model.gpus_per_replica)."
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, also if its weights are elsewhere until then."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        return torch.empty(0, device=hook.execution_device).device  # type: ignore[union-attr]
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@torch.no_grad()
def matrix_of(
    linear: Any, fan_in: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "hidden fan_in"]:
    """The matrix W that a layer multiplies with, in float32: its outputs for unit vectors.

    Whatever the layer's numbers are, and wherever; exact but for the rounding of its output.
    """
    bias, columns = linear.bias, []
    linear.bias = None
    try:
        for first in range(0, fan_in, PROBES):
            count = min(PROBES, fan_in - first)
            unit = torch.zeros(count, fan_in, dtype=dtype, device=device)
            unit[torch.arange(count), torch.arange(first, first + count)] = 1
            columns.append(linear(unit).float().T)
    finally:
        linear.bias = bias
    return torch.cat(columns, dim=1).contiguous()


@torch.no_grad()
def bias_of(linear: Any, fan_in: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What a layer adds, `"hidden"`: its output for nothing."""
    if linear.bias is None:
        return None
    found: Tensor = linear(torch.zeros(1, fan_in, dtype=dtype, device=device))[0]
    return found.clone()
