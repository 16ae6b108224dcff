"""Greedy decoding, token by token, of the rows of a batch; rows leave as they end."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from ray_abliterate.model.engine.batch import Batch, to_device
from ray_abliterate.model.engine.cuda_graphs import CudaGraphs, StepInput
from ray_abliterate.model.engine.generation_state import GenerationState
from ray_abliterate.model.engine.kv_cache import KVCache
from ray_abliterate.model.engine.packed_attention import PackedPass
from ray_abliterate.model.engine.packed_model import PackedModel

COMPACT_BELOW = 0.75
"""Rows are moved together when less than this share of the KV cache's rows is live: a copy costs
about what attention over dead rows costs in a step or two."""

STRIDE_CUDA = 4
"""Steps on a GPU between two looks at the tokens: rows that ended go on for two more on average."""
DECODE = "decode"
"""Name of the stage in a profile."""


class Decoder:
    """Decodes greedily with one model.

    Attributes:
        stride: Steps between two looks at what was written.
        graphs: Replays steps, on devices where kernels wait for their launch; None elsewhere.
    """

    def __init__(self, model: PackedModel) -> None:
        cuda = model.device.type == "cuda"
        self.stride = STRIDE_CUDA if cuda else 1
        self.graphs = CudaGraphs(model) if cuda else None
        self._model = model

    def new_kv_cache(self, rows: int, positions: int) -> KVCache:
        """Return an empty KV cache, valid until the next one is made: that may overwrite it."""
        return KVCache(rows, positions, self.graphs.kv_pool if self.graphs else None)

    def invalidate_graphs(self) -> None:
        """Replay no step that was recorded until now, because a hook of the model changed."""
        if self.graphs is not None:
            self.graphs.invalidate()

    def release_memory(self) -> None:
        """Free what is held for later answers."""
        if self.graphs is not None:
            self.graphs.release()

    def decode(
        self,
        batch: Batch,
        kv_cache: KVCache,
        states: Sequence[GenerationState],
        edits: Sequence[int],
        replay: bool = True,
    ) -> None:
        """Write all answers to their end.

        Tokens are read every `stride` steps, since reading them waits for the device.

        Args:
            batch: The rows.
            kv_cache: Keys and values of all their tokens but the last; it has at least one row more
                than there are in all copies.
            states: What has been written, for each copy.
            edits: The edit of each copy.
            replay: Whether steps may be replayed as CUDA graphs.
        """
        count, device = len(batch.rows), self._model.device
        graphs = self.graphs if replay else None
        total = count * len(edits)
        kv_cache.truncate_rows(total + (1 if graphs else 0))
        cache_rows = torch.arange(total)  # (copy * row): where each row lies in the cache by now
        while True:
            live = [
                copy * count + row
                for copy, state in enumerate(states)
                for row in state.unfinished_rows()
            ]
            if not live:
                return
            needed = graphs.padded_rows(len(live)) if graphs else len(live)
            if needed < COMPACT_BELOW * kv_cache.rows:
                idle = torch.full((needed - len(live),), kv_cache.rows - 1)
                kv_cache.select_rows(torch.cat([cache_rows[live], idle]).to(device))
                cache_rows[live] = torch.arange(len(live))
            texts = [states[place // count].tokens[place % count] for place in live]
            step_input = StepInput(
                [text[-1] for text in texts],
                cache_rows[live].tolist(),
                [
                    len(batch.rows[place % count]) + len(text) - 1
                    for place, text in zip(live, texts, strict=True)
                ],
                [edits[place // count] for place in live],
            )
            steps = min(self.stride, kv_cache.positions - max(step_input.positions))
            with record_function(DECODE):
                decode = graphs.decode if graphs else self._decode
                new_tokens = decode(kv_cache, step_input, steps).tolist()  # [row][step]
            for place, tokens in zip(live, new_tokens, strict=True):
                # every token is right, as if a draft had predicted it
                states[place // count].accept(place % count, tokens, tokens)

    def _decode(self, kv_cache: KVCache, step_input: StepInput, steps: int) -> Tensor:
        """Return the next `steps` tokens of each row, `"row step"`, kernel by kernel."""
        device = self._model.device
        ids, rows, positions, edits = (to_device(values, device) for values in step_input.columns())
        every_token, tokens = torch.arange(len(ids), device=device), []
        for step in range(steps):
            key_length = 1 + max(step_input.positions) + step
            one_token_each = PackedPass(
                ids, rows, positions + step, every_token, key_length, max_queries=1, edits=edits
            )
            logits, _ = self._model.run(one_token_each, kv_cache)  # (row, vocab)
            ids = logits.argmax(-1)
            tokens.append(ids)
        return torch.stack(tokens, dim=1)
