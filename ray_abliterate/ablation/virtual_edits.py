"""Virtual edits: several plans at once, computed beside the weights instead of written into them.

Each token of a pass may have its own edit. Layers do as they always did while no edits are open.
In float32 this gives what edited weights give; in half precision outputs are rounded once more, so
that scores can differ in the last digits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.search.plan import Plan


class VirtualEdits:
    """Edits of several plans on one model, by token."""

    def __init__(self, model: PackedModel, cache: WeightCache) -> None:
        """Install the hooks.

        Raises:
            ModelError: a writer is not the weight of a linear layer (stacked experts).
        """
        self._cache = cache
        self._choice = _ByToken()
        self._layers = cache.beside(self._choice)
        model.on_edits = self._choice.begin_pass

    @contextmanager
    def opened(self, plans: Sequence[Plan], directions: Directions) -> Iterator[int]:
        """Edit number i is that of plan i in this block; gives the number of untouched blocks.

        Raises:
            ModelError: an edit is open already.
        """
        if self._choice.count:
            raise ModelError("edits are open already on this model; edits don't nest")
        found: dict[str, dict[int, Edit]] = {}
        lowest = self._cache.layers
        for number, plan in enumerate(plans):
            for writer, edit in self._cache.edits(plan, directions):
                found.setdefault(writer.parameter, {})[number] = edit
                lowest = min(lowest, writer.layer)
        self._choice.count = len(plans)
        try:
            for parameter, edits in found.items():
                self._layers[parameter].open(edits, len(plans))
            yield lowest
        finally:
            for parameter in found:
                self._layers[parameter].close()
            self._choice.count = 0
            self._choice.begin_pass(None)


class _ByToken:
    """Each token of a pass has the edit that the pass says; see `layer_hooks.Choice`."""

    def __init__(self) -> None:
        self.count = 0
        """Edits that are open."""
        self._edit_of: Tensor | None = None
        self._one_hot: dict[tuple[torch.dtype, int], Tensor] = {}

    def begin_pass(self, edits: Tensor | None) -> None:
        """These are the edits of the next pass's tokens."""
        self._edit_of = edits
        self._one_hot.clear()

    @property
    def made(self) -> bool:
        return self._edit_of is not None

    def rows(self, values: Tensor) -> Tensor:
        return values[self._edit_of]

    def own(self, products: Tensor, rank: int) -> Tensor:
        key = products.dtype, rank
        if key not in self._one_hot:
            assert self._edit_of is not None
            every = torch.arange(self.count, device=self._edit_of.device)
            one_hot = self._edit_of[:, None] == every.repeat_interleave(rank)
            self._one_hot[key] = one_hot.to(products.dtype)
        return products * self._one_hot[key]
