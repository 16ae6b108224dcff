"""Token segments of many rows through a transformers model in one flat pass, without padding.

The linear layers see one sequence of all tokens there are, so no work is done on padding. Only
attention knows rows (`model/engine/packed_attention.py`). So rows may bring any number of tokens to
a pass (a prompt, a draft, one token), and leave when they like. Knows nothing about prompts, texts
or edits.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.model.component_outputs import Places, outputs_of, stacked
from ray_abliterate.model.engine.kv_cache import Slab
from ray_abliterate.model.engine.layer_skipping import begun_at, recorded
from ray_abliterate.model.engine.packed_attention import (
    ATTENTION,
    NotPackable,
    Pass,
    attending,
    packed_attention,
)


class PackedModel:
    """A causal language model whose rows are packed into flat passes."""

    def __init__(self, module: Any, blocks: Sequence[nn.Module]) -> None:
        """Make transformers know our attention.

        Raises:
            NotPackable: the model takes no positions, or its logits can't be chosen.
        """
        from transformers import AttentionInterface

        taken = set(inspect.signature(module.forward).parameters)
        if not {"position_ids", "logits_to_keep"} <= taken:
            raise NotPackable("the model takes no position_ids, or no logits_to_keep")
        if len({parameter.device for parameter in module.parameters()}) > 1:
            raise NotPackable("the model is spread over devices")
        if any("forward" in vars(block) for block in blocks):
            raise NotPackable("its blocks are wrapped (offloaded?)")
        AttentionInterface.register(ATTENTION, packed_attention)
        self._module, self._blocks = module, list(blocks)
        self.on_edits: Callable[[Tensor | None], None] | None = None
        """Is told the edit of each token before every pass (see `ablation/virtual_edits.py`)."""
        configs = [getattr(m, "config", None) for m in module.modules()]
        self._configs = list({id(c): c for c in configs if c is not None}.values())

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self._module.get_input_embeddings().weight.device
        return device

    @torch.inference_mode()
    def run(
        self, given: Pass, slab: Slab, record: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One pass.

        Args:
            given: The tokens.
            slab: Keys and values; those of the tokens are added.
            record: Blocks whose inputs are wanted.

        Returns:
            Logits of the wanted tokens, `"wanted vocab"`, and inputs by block, `"token hidden"`.
        """
        found: dict[int, Tensor] = {}
        if self.on_edits is not None:
            self.on_edits(given.edits)
        states = None if given.states is None else given.states[None]
        with (
            self._ours(),
            begun_at(self._blocks, given.start, states),
            recorded(self._blocks, record, found),
            attending(given, slab),
        ):
            output = self._module(
                input_ids=given.ids[None],
                position_ids=given.positions[None],
                logits_to_keep=given.wanted,
                use_cache=False,
            )
        return output.logits[0], {layer: inputs[0] for layer, inputs in found.items()}

    @torch.inference_mode()
    def residuals(self, given: Pass, slab: Slab, more: Places = ()) -> Tensor:
        """Every block's output at the wanted tokens, `"wanted layer hidden"`, float32; `more`
        modules' outputs come after them."""

        def take(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, -2).index_select(0, given.wanted).float()

        with outputs_of([*self._blocks, *more], take) as found:
            self.run(given, slab)
        return stacked(found)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """The model attends our way in this block, and does not look its input through for padding,
        of which there is none: that would wait for the device."""
        names = [config._attn_implementation_internal for config in self._configs]
        pads = [getattr(config, "pad_token_id", None) for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION
            config.pad_token_id = None
        try:
            yield
        finally:
            for config, name, pad in zip(self._configs, names, pads, strict=True):
                config._attn_implementation_internal = name
                config.pad_token_id = pad
