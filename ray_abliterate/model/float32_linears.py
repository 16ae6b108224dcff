"""Half-precision linear layers computed in float32, on CPUs that are faster at it.

Without matrix units a CPU multiplies bfloat16 at half the rate of float32. The product of two
bfloat16 numbers is exact in float32, and both ways add up in float32 and round once at the end:
only the order of the sum differs. Costs a float32 copy of the weights.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

PROBE_ROWS = 64
WORTHWHILE = 1.2
"""Copies are made if float32 is faster by this factor."""


class Upcast:
    """Linear layers of one model that compute in float32 and round their output."""

    def __init__(self, module: nn.Module) -> None:
        self._copies: dict[str, tuple[Any, Tensor, Tensor | None]] = {}
        for name, linear in module.named_modules():
            if not _is_plain(linear) or linear.weight.dtype == torch.float32:
                continue
            bias = linear.bias.detach().float() if linear.bias is not None else None
            weight = linear.weight.detach().float()
            self._copies[name] = linear, weight, bias
            linear.forward = _forward(weight, bias)  # type: ignore[method-assign]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(weight.numel() * 4 for _, weight, _ in self._copies.values())

    @torch.no_grad()
    def written(self, parameter: str) -> None:
        """A parameter has new values: copy them."""
        found = self._copies.get(parameter.rpartition(".")[0])
        if found is None:
            return
        linear, weight, bias = found
        weight.copy_(linear.weight)
        if bias is not None:
            bias.copy_(linear.bias)


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer whose weights are what their type says: not quantized ones."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _forward(weight: Tensor, bias: Tensor | None) -> Any:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), weight, bias).to(x.dtype)

    return forward


@torch.inference_mode()
def faster_in_float32(module: nn.Module) -> bool:
    """Whether this machine multiplies this model's weights faster in float32, by measurement."""
    linears: list[Any] = [m for m in module.modules() if _is_plain(m)]
    if not linears or any(m.weight.device.type != "cpu" for m in linears):
        return False
    weight = max((m.weight for m in linears[:-1] or linears), key=Tensor.numel)
    if weight.dtype == torch.float32:
        return False
    rows, copy = weight.new_ones(PROBE_ROWS, weight.shape[1]), weight.float()
    wide = rows.float()

    def seconds(x: Tensor, w: Tensor) -> float:
        found = []
        for _ in range(5):
            started = time.perf_counter()
            nn.functional.linear(x, w)
            found.append(time.perf_counter() - started)
        return min(found)

    return seconds(rows, weight) > WORTHWHILE * seconds(wide, copy)
