"""Runs the tokens of many rows through a transformers model in one flat pass, without padding.

The linear layers see one sequence of all tokens there are, so no work is done on padding. Only
attention knows rows (`model/engine/packed_attention.py`). So rows may bring any number of tokens to
a pass (a prompt, a draft, one token), and leave at any time. Knows nothing about prompts, texts or
edits.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.model.component_outputs import (
    ComponentModules,
    capture_outputs,
    stack_outputs,
)
from ray_abliterate.model.engine.kv_cache import KVCache
from ray_abliterate.model.engine.layer_skipping import record_block_inputs, start_at_block
from ray_abliterate.model.engine.packed_attention import (
    ATTENTION,
    NotPackable,
    PackedPass,
    packed_attention,
    packed_attention_of,
)


class PackedModel:
    """A causal language model whose rows are packed into flat passes.

    Attributes:
        on_edits: Is called before every pass with the edit of each token, `"token"`, or with None
            (see `ablation/virtual_edits.py`).
    """

    def __init__(self, module: Any, blocks: Sequence[nn.Module]) -> None:
        """Register the packed attention with transformers.

        Args:
            module: The transformers model.
            blocks: Its residual blocks.

        Raises:
            NotPackable: the model takes no positions, its logits can't be chosen, or its weights
                are spread over devices or offloaded.
        """
        from transformers import AttentionInterface

        parameters = set(inspect.signature(module.forward).parameters)
        if not {"position_ids", "logits_to_keep"} <= parameters:
            raise NotPackable("the model takes no position_ids, or no logits_to_keep")
        if len({parameter.device for parameter in module.parameters()}) > 1:
            raise NotPackable("the model is spread over devices")
        if any("forward" in vars(block) for block in blocks):
            raise NotPackable("its blocks are wrapped (offloaded?)")
        AttentionInterface.register(ATTENTION, packed_attention)
        self._module, self._blocks = module, list(blocks)
        self.on_edits: Callable[[Tensor | None], None] | None = None
        configs = [getattr(m, "config", None) for m in module.modules()]
        self._configs = list({id(c): c for c in configs if c is not None}.values())

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        device: torch.device = self._module.get_input_embeddings().weight.device
        return device

    @torch.inference_mode()
    def run(
        self, packed: PackedPass, kv_cache: KVCache, record: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run one pass.

        Args:
            packed: The tokens.
            kv_cache: Keys and values; those of the tokens are added.
            record: Blocks whose inputs are wanted.

        Returns:
            The wanted logits, `"wanted vocab"`, and the inputs by block, `"token hidden"`.
        """
        inputs: dict[int, Tensor] = {}
        if self.on_edits is not None:
            self.on_edits(packed.edits)
        states = None if packed.states is None else packed.states[None]  # (1, token, hidden)
        with (
            self._packed_attention(),
            start_at_block(self._blocks, packed.start, states),
            record_block_inputs(self._blocks, record, inputs),
            packed_attention_of(packed, kv_cache),
        ):
            output = self._module(
                input_ids=packed.ids[None],
                position_ids=packed.positions[None],
                logits_to_keep=packed.logits_at,
                use_cache=False,
            )
        return output.logits[0], {layer: hidden[0] for layer, hidden in inputs.items()}

    @torch.inference_mode()
    def residuals(
        self, packed: PackedPass, kv_cache: KVCache, components: ComponentModules = ()
    ) -> Tensor:
        """Return every block's output at the wanted tokens, `"wanted layer hidden"`, float32.

        The outputs of `components` come after those of the blocks.
        """

        def at_wanted_tokens(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, -2).index_select(0, packed.logits_at).float()

        with capture_outputs([*self._blocks, *components], at_wanted_tokens) as outputs:
            self.run(packed, kv_cache)
        return stack_outputs(outputs)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Let the model use packed attention inside the block.

        Nor does it look for padding in its input, of which there is none: that would wait for the
        device.
        """
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
