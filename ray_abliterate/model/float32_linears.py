"""Half-precision linear layers computed in float32, on CPUs that are faster at it.

Without matrix units a CPU multiplies bfloat16 at half the rate of float32. The product of two
bfloat16 numbers is exact in float32, and both ways add up in float32 and round once at the end:
only the order of the sum differs. Costs a float32 copy of the weights.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

TIMED_ROWS = 64
WORTHWHILE = 1.2
"""Copies are made if float32 is faster by this factor."""


class Float32Linears:
    """The linear layers of one model, made to compute in float32 and round their output."""

    def __init__(self, module: nn.Module) -> None:
        """Copy the weights and replace the layers' forward."""
        self._copies: dict[str, tuple[Any, Tensor, Tensor | None]] = {}
        for name, linear in module.named_modules():
            if not _is_plain_linear(linear) or linear.weight.dtype == torch.float32:
                continue
            bias = linear.bias.detach().float() if linear.bias is not None else None
            weight = linear.weight.detach().float()
            self._copies[name] = linear, weight, bias
            linear.forward = _float32_forward(weight, bias)  # type: ignore[method-assign]

    @torch.no_grad()
    def refresh(self, parameter: str) -> None:
        """Copy a parameter's new values, given its dotted name, if its layer has a copy."""
        copies = self._copies.get(parameter.rpartition(".")[0])
        if copies is None:
            return
        linear, weight, bias = copies
        weight.copy_(linear.weight)
        if bias is not None:
            bias.copy_(linear.bias)


def _is_plain_linear(module: Any) -> bool:
    """Return whether it is a linear layer whose weights are plain numbers, not quantized ones."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _float32_forward(weight: Tensor, bias: Tensor | None) -> Any:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), weight, bias).to(x.dtype)

    return forward


@torch.inference_mode()
def is_faster_in_float32(module: nn.Module) -> bool:
    """Time the model's largest weight, and return whether this machine is faster in float32."""
    linears: list[Any] = [m for m in module.modules() if _is_plain_linear(m)]
    if not linears or any(m.weight.device.type != "cpu" for m in linears):
        return False
    # the largest one but for the last, which is the head
    weight = max((m.weight for m in linears[:-1] or linears), key=Tensor.numel)
    if weight.dtype == torch.float32:
        return False
    rows, copy = weight.new_ones(TIMED_ROWS, weight.shape[1]), weight.float()
    wide_rows = rows.float()

    def seconds(x: Tensor, w: Tensor) -> float:
        durations = []
        for _ in range(5):
            started = time.perf_counter()
            nn.functional.linear(x, w)
            durations.append(time.perf_counter() - started)
        return min(durations)

    return seconds(rows, weight) > WORTHWHILE * seconds(wide_rows, copy)
