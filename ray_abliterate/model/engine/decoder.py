"""Greedy decoding, token by token, of the rows of a batch; rows leave as they end."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from ray_abliterate.model.engine.batch import Batch, on_device
from ray_abliterate.model.engine.cuda_graphs import RecordedSteps, Tip
from ray_abliterate.model.engine.generation_state import Writing
from ray_abliterate.model.engine.kv_cache import Slab
from ray_abliterate.model.engine.packed_attention import Pass
from ray_abliterate.model.engine.packed_model import PackedModel

COMPACT_BELOW = 0.75
"""Rows are moved together when so few of the slab's are live: a copy costs about what attention
over dead rows costs in a step or two."""

STRIDE_CUDA = 4
"""Steps on a GPU before the host looks: rows that ended go on for two more on average."""
DECODE = "decode"
"""Name of the stage in a profile."""


class Decoder:
    """Decodes with one model.

    Attributes:
        stride: Steps between two looks at what was written.
        recorded: Replays steps, on devices that wait for launches.
    """

    def __init__(self, model: PackedModel) -> None:
        cuda = model.device.type == "cuda"
        self.stride = STRIDE_CUDA if cuda else 1
        self.recorded = RecordedSteps(model) if cuda else None
        self._model = model

    def slab(self, rows: int, positions: int) -> Slab:
        """Keys and values of so many rows, which one more slab may overwrite."""
        return Slab(rows, positions, self.recorded.arena if self.recorded else None)

    def forget(self) -> None:
        """Give back what is held for later answers."""
        if self.recorded is not None:
            self.recorded.forget()

    def write_on(
        self,
        batch: Batch,
        slab: Slab,
        writings: Sequence[Writing],
        edits: Sequence[int],
        record: bool = True,
    ) -> None:
        """Write what is live to its end.

        Tokens are read every `stride` steps: reading them waits for the device.

        Args:
            batch: The rows.
            slab: Keys and values of all their tokens but the last; one row more than there are of
                all copies.
            writings: What was written, for each copy.
            edits: The copies' edits.
            record: Steps may be replayed.
        """
        count, device = len(batch.rows), self._model.device
        recorded = self.recorded if record else None
        total = count * len(edits)
        slab.keep_first(total + (1 if recorded else 0))
        places = torch.arange(total)
        """Where each row lies in the slab by now."""
        while True:
            live = [copy * count + row for copy, w in enumerate(writings) for row in w.live()]
            if not live:
                return
            room = recorded.room(len(live)) if recorded else len(live)
            if room < COMPACT_BELOW * slab.rows:
                idle = torch.full((room - len(live),), slab.rows - 1)
                slab.keep(torch.cat([places[live], idle]).to(device))
                places[live] = torch.arange(len(live))
            texts = [writings[p // count].tokens[p % count] for p in live]
            tip = Tip(
                [text[-1] for text in texts],
                places[live].tolist(),
                [len(batch.rows[p % count]) + len(t) - 1 for p, t in zip(live, texts, strict=True)],
                [edits[p // count] for p in live],
            )
            steps = min(self.stride, slab.positions - max(tip.positions))
            with record_function(DECODE):
                tokens = recorded.tokens if recorded else self._tokens
                said = tokens(slab, tip, steps).tolist()
            for place, text in zip(live, said, strict=True):
                writings[place // count].take(place % count, text, text)

    def _tokens(self, slab: Slab, tip: Tip, steps: int) -> Tensor:
        """So many tokens of each row, one after the other, `"row step"`."""
        device = self._model.device
        ids, rows, positions, edits = (on_device(values, device) for values in tip.columns())
        every, found = torch.arange(len(ids), device=device), []
        for step in range(steps):
            reach = 1 + max(tip.positions) + step
            given = Pass(ids, rows, positions + step, every, reach, 1, edits=edits)
            logits, _ = self._model.run(given, slab)
            ids = logits.argmax(-1)
            found.append(ids)
        return torch.stack(found, dim=1)
