"""Virtual edits: several plans at once, computed beside the weights instead of written into them.

A writer's output under the edit W' = diag(s) (W + Σ a_r b_rᵀ) diag(c) is

    y = s ⊙ (W (c ⊙ x) + Σ a_r b_rᵀ(c ⊙ x))

so that each token of a pass may have its own edit. Hooks are installed once and do nothing while
no edits are open. In float32 this gives what edited weights give; in half precision the output is
rounded once more than with edited weights, so that scores can differ in the last digits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.architecture import Writer
from ray_abliterate.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.packed import PackedModel
from ray_abliterate.plan import Plan
from ray_abliterate.weights import WeightCache


@dataclass(frozen=True)
class _Stacked:
    """The edits of one writer, `rank` rows each of a and b, one of the rest.

    Rows of plans that leave it alone change nothing.
    """

    rank: int
    a: Tensor
    b: Tensor
    s: Tensor | None
    c: Tensor | None
    bias: Tensor | None
    """The edited biases, where the writer has one."""


class VirtualEdits:
    """Edits of several plans on one model, by token."""

    def __init__(self, model: PackedModel, module: nn.Module, cache: WeightCache) -> None:
        """Install the hooks.

        Raises:
            ModelError: a writer is not the weight of a linear layer (stacked experts).
        """
        self._cache = cache
        self._stacked: dict[str, _Stacked] = {}
        self._edit_of: Tensor | None = None
        self._one_hot: dict[tuple[torch.dtype, int], Tensor] = {}
        self._count = 0
        self._modules = {w.parameter: _linear(module, w) for w in cache.writers}
        for parameter, linear in self._modules.items():
            linear.register_forward_pre_hook(self._before(parameter))
            linear.register_forward_hook(self._after(parameter))
        model.on_edits = self._begin_pass

    @contextmanager
    def opened(self, plans: Sequence[Plan], directions: Directions) -> Iterator[int]:
        """Edit number i is that of plan i in this block; gives the number of untouched blocks.

        Raises:
            ModelError: an edit is open already.
        """
        if self._stacked:
            raise ModelError("edits are open already on this model; edits don't nest")
        found: dict[str, dict[int, Any]] = {}
        lowest = self._cache.layers
        for number, plan in enumerate(plans):
            for writer, edit in self._cache.edits(plan, directions):
                found.setdefault(writer.parameter, {})[number] = edit
                lowest = min(lowest, writer.layer)
        self._count = len(plans)
        for parameter, edits in found.items():
            self._stacked[parameter] = _stack(self._modules[parameter], edits, len(plans))
        try:
            yield lowest
        finally:
            self._stacked.clear()
            self._edit_of = None
            self._one_hot.clear()

    def _begin_pass(self, edits: Tensor | None) -> None:
        self._edit_of = edits
        self._one_hot.clear()

    def _before(self, parameter: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            stacked = self._stacked.get(parameter)
            if stacked is None or stacked.c is None or self._edit_of is None:
                return None
            return (args[0] * stacked.c[self._edit_of], *args[1:])

        return hook

    def _after(self, parameter: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            stacked = self._stacked.get(parameter)
            if stacked is None or self._edit_of is None:
                return None
            x, y = args[0].flatten(0, -2), output.flatten(0, -2)
            if stacked.bias is not None:
                y = y - module.bias
            own = (x @ stacked.b.T) * self._chosen(x.dtype, stacked.rank)
            y = torch.addmm(y, own, stacked.a)
            if stacked.s is not None:
                y = y * stacked.s[self._edit_of]
            if stacked.bias is not None:
                y = y + stacked.bias[self._edit_of]
            return y.view_as(output)

        return hook

    def _chosen(self, dtype: torch.dtype, rank: int) -> Tensor:
        """1 where a token has an edit, for each of its directions, `"token edit_rank"`."""
        if (dtype, rank) not in self._one_hot:
            assert self._edit_of is not None
            one_hot = nn.functional.one_hot(self._edit_of, self._count)
            self._one_hot[dtype, rank] = one_hot.to(dtype).repeat_interleave(rank, dim=1)
        return self._one_hot[dtype, rank]


def _linear(module: nn.Module, writer: Writer) -> nn.Module:
    """The module whose weight the writer is."""
    owner, _, name = writer.parameter.rpartition(".")
    found = module.get_submodule(owner)
    if name != "weight" or module.get_parameter(writer.parameter).ndim != 2:
        raise ModelError(f"{writer.parameter} is not the weight of a linear layer")
    return found


def _stack(linear: Any, edits: dict[int, Any], count: int) -> _Stacked:
    """Edits by number as rows of tensors in the weight's dtype."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    some = next(iter(edits.values()))
    rank = max(edit.a.shape[1] for edit in edits.values())

    def low_rank(name: str, width: int) -> Tensor:
        stacked = torch.zeros(count, rank, width, dtype=torch.float32, device=weight.device)
        for number, edit in edits.items():
            value = getattr(edit, name)[0]
            stacked[number, : len(value)] = value
        return stacked.flatten(0, 1).to(weight.dtype)

    def rows(name: str, width: int, fill: float) -> Tensor:
        stacked = torch.full((count, width), fill, dtype=torch.float32, device=weight.device)
        for number, edit in edits.items():
            value = getattr(edit, name)
            if value is not None:
                stacked[number] = value[0]
        return stacked.to(weight.dtype)

    scaled = [
        name for name in ("s", "c") if any(getattr(e, name) is not None for e in edits.values())
    ]
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
        rows("s", hidden, 1.0) if "s" in scaled else None,
        rows("c", fan_in, 1.0) if "c" in scaled else None,
        new_bias,
    )
