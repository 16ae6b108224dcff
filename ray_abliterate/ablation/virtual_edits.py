"""Virtual edits: several plans at once, computed by hooks instead of written into the weights.

Each token of a pass may have its own edit. Layers compute as they always did while no edits are
applied. In float32 this gives what edited weights give; in half precision outputs are rounded once
more, so that scores can differ in the last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.search.plan import Plan


class SelectsEdits(Protocol):
    """A model whose passes say which edit each token is computed with."""

    on_edits: Callable[[Tensor | None], None] | None


class VirtualEdits:
    """The edits of several plans on one model, chosen token by token."""

    def __init__(self, model: SelectsEdits, cache: WeightCache) -> None:
        """Hook every writer's layer.

        Args:
            model: Runs the passes.
            cache: The pristine weights of its writers.

        Raises:
            ModelError: a writer is not the weight of a linear layer (stacked experts).
        """
        self._cache = cache
        self._selector = _EditPerToken()
        self._hooks = cache.add_hooks(self._selector)
        model.on_edits = self._selector.begin_pass

    @contextmanager
    def applied(self, plans: Sequence[Plan], directions: Directions) -> Iterator[int]:
        """Let edit number i be that of plan i inside the block; yield the first edited layer.

        Blocks below that layer are the base model's under every plan; if nothing is edited, the
        number of layers is yielded.

        Raises:
            ModelError: edits are applied already; they don't nest.
        """
        if self._selector.count:
            raise ModelError("edits are applied already to this model; edits don't nest")
        edits: dict[str, dict[int, Edit]] = {}  # by parameter, then by the plan's number
        first_edited = self._cache.layers
        for number, plan in enumerate(plans):
            for writer, edit in self._cache.edits(plan, directions):
                edits.setdefault(writer.parameter, {})[number] = edit
                first_edited = min(first_edited, writer.layer)
        self._selector.count = len(plans)
        try:
            for parameter, by_number in edits.items():
                self._hooks[parameter].set_edits(by_number, len(plans))
            yield first_edited
        finally:
            for parameter in edits:
                self._hooks[parameter].clear_edits()
            self._selector.count = 0
            self._selector.begin_pass(None)


class _EditPerToken:
    """A `layer_hooks.EditSelector`: each token of a pass has the edit that the pass names."""

    def __init__(self) -> None:
        self.count = 0
        """Edits that are applied."""
        self._edit_of_token: Tensor | None = None
        self._one_hot: dict[tuple[torch.dtype, int], Tensor] = {}

    def begin_pass(self, edits: Tensor | None) -> None:
        """Set the edit of each token of the next pass, `"token"`; None edits no token."""
        self._edit_of_token = edits
        self._one_hot.clear()

    @property
    def active(self) -> bool:
        return self._edit_of_token is not None

    def select_rows(self, values: Tensor) -> Tensor:
        return values[self._edit_of_token]  # (edit, width) -> (token, width)

    def mask_products(self, products: Tensor, rank: int) -> Tensor:
        key = products.dtype, rank
        if key not in self._one_hot:  # the same in all layers of a pass
            assert self._edit_of_token is not None
            numbers = torch.arange(self.count, device=self._edit_of_token.device)
            # (token, edit * rank): 1 where the column belongs to the token's edit
            one_hot = self._edit_of_token[:, None] == numbers.repeat_interleave(rank)
            self._one_hot[key] = one_hot.to(products.dtype)
        return products * self._one_hot[key]
