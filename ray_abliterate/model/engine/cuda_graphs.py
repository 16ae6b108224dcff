"""Decode steps that are recorded once and then replayed: on a GPU, CUDA graphs.

A step of a few rows is some hundred small kernels, and a GPU has done each before Python has
launched the next. Recorded, a step is one launch. It then reads the tensors it was recorded with,
whatever is in them: so keys and values lie in an arena, rows are filled up with idle ones, and the
positions that are looked at are rounded up, which leaves a few recordings for a whole run. Edited
weights are written in place; edits beside the weights are tensors of their own, and recordings of
earlier ones are forgotten.

Whether a recording does what the model does is seen before it is used; if not, or if a model can't
be recorded (it looks at values between two kernels, as some mixtures of experts do), its kernels
are launched one by one, as elsewhere.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ray_abliterate.ablation.layer_hooks import EditedLayer
from ray_abliterate.model.engine.batch import on_device
from ray_abliterate.model.engine.kv_cache import Arena, Slab
from ray_abliterate.model.engine.packed_attention import Pass
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.padded_model import same_logits

log = logging.getLogger(__name__)

ROW_STEP = 16
"""Rows of a slab that has been compacted are a multiple of this, one more for idle rows aside."""
REACH_STEP = 64
"""So are the positions that a step looks at."""
MOST_RECORDINGS = 64
"""Then all are forgotten, and made anew as they are needed."""

Key = tuple[int, int, int]
"""Rows and positions of a slab, and the positions that are looked at."""
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a function does to tensors: what does it again, and its result, which lies where it
lay. May run it, or not."""


@dataclass(frozen=True)
class Tip:
    """The ends of some rows: what a step feeds of each.

    Attributes:
        ids: The last token.
        rows: Row of the slab.
        positions: The token's position in its row.
        edits: Number of the edit it is computed with.
    """

    ids: Sequence[int]
    rows: Sequence[int]
    positions: Sequence[int]
    edits: Sequence[int]

    def filled(self, count: int, spare: int) -> "Tip":
        """Idle tokens at the start of a spare row, up to so many."""
        idle = count - len(self.ids)
        return Tip(
            [*self.ids, *[0] * idle],
            [*self.rows, *[spare] * idle],
            [*self.positions, *[0] * idle],
            [*self.edits, *[0] * idle],
        )

    def columns(self) -> tuple[Sequence[int], ...]:
        """As a step's tensors are, in order."""
        return self.ids, self.rows, self.positions, self.edits


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Columns of a tip as tensors. A step replaces ids by the next ones and adds 1 to positions."""


@dataclass(frozen=True)
class _Recording:
    """A step, and the tensors it reads and writes."""

    inputs: Inputs
    replay: Replay

    def load(self, tip: Tip) -> None:
        """The next replay continues these."""
        for held, values in zip(self.inputs, tip.columns(), strict=True):
            held.copy_(on_device(values, held.device), non_blocking=True)


class RecordedSteps:
    """The recorded steps of one model.

    A step is the same kernels on the same shapes whether it is replayed or not, so that a trial's
    scores don't depend on what was recorded before it.

    Attributes:
        arena: Where slabs must lie whose steps are recorded; their last row is for idle tokens.
        off: Why steps are not recorded; empty while they are.
    """

    def __init__(self, model: PackedModel, record: Recorder | None = None) -> None:
        """
        Args:
            model: Whose steps.
            record: How; as a CUDA graph if None.
        """
        self.arena = Arena()
        self.off = ""
        self._model = model
        self._record = record or CudaGraphs(model.device)
        self._known: dict[Key, _Recording] = {}
        self._seen: set[Key] = set()
        self._valid_for = 0, 0

    def room(self, live: int) -> int:
        """Rows of a slab for so many live ones."""
        return -(-live // ROW_STEP) * ROW_STEP + 1

    def forget(self) -> None:
        """Give all memory back."""
        self._known.clear()
        self.arena.clear()

    @torch.inference_mode()
    def tokens(self, slab: Slab, tip: Tip, steps: int) -> Tensor:
        """So many tokens of each row, one after the other, `"row step"`."""
        reach = -(-(max(tip.positions) + steps) // REACH_STEP) * REACH_STEP
        reach, live = min(reach, slab.positions), len(tip.ids)
        tip = tip.filled(slab.rows - 1, slab.rows - 1)
        recording = self._recording(slab, tip, reach, live)
        if recording is None:
            inputs = self._inputs(tip)
            step: Callable[[], object] = partial(self._advance, slab, inputs, reach)
        else:
            recording.load(tip)
            inputs, step = recording.inputs, recording.replay
        found = []
        for _ in range(steps):
            step()
            found.append(inputs[0].clone())
        return torch.stack(found, dim=1)[:live]

    def _inputs(self, tip: Tip) -> Inputs:
        ids, rows, positions, edits = (
            on_device(values, self._model.device).clone() for values in tip.columns()
        )
        return ids, rows, positions, edits

    def _advance(self, slab: Slab, inputs: Inputs, reach: int) -> Tensor:
        """One step, and its logits, `"row vocab"`."""
        ids, rows, positions, edits = inputs
        every = torch.arange(len(ids), device=ids.device)
        given = Pass(ids, rows, positions, every, reach, 1, edits=edits)
        logits, _ = self._model.run(given, slab)
        ids.copy_(logits.argmax(-1))
        positions.add_(1)
        return logits

    def _recording(self, slab: Slab, tip: Tip, reach: int, live: int) -> _Recording | None:
        """The one for a slab of this shape; made when the shape comes for the second time, since
        one costs about three steps."""
        valid_for = self.arena.moves, EditedLayer.changes
        if valid_for != self._valid_for or len(self._known) >= MOST_RECORDINGS:
            self._known.clear()
            self._seen.clear()
            self._valid_for = valid_for
        key = slab.rows, slab.positions, reach
        if key in self._seen and key not in self._known and not self.off:
            try:
                self._make(key, slab, tip, live)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0])
        self._seen.add(key)
        return self._known.get(key)

    def _make(self, key: Key, slab: Slab, tip: Tip, live: int) -> None:
        """Record a step, and see whether it does what the model does."""
        inputs, reach = self._inputs(tip), key[-1]
        expected = self._advance(slab, inputs, reach)[:live]
        if not bool(expected.isfinite().all()):
            return  # a broken edit: nothing can be told by it
        replay, logits = self._record(partial(self._advance, slab, inputs, reach))
        recording = _Recording(inputs, replay)
        recording.load(tip)
        replay()
        if same_logits(expected, logits[:live]):
            self._known[key] = recording
        else:
            self._give_up("a recorded step gives other logits")

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._known.clear()
        log.info("decode steps are not recorded: %s", reason)


class CudaGraphs:
    """Records CUDA graphs, which share the memory of what they compute in between."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """See `Recorder`; caches are left alone, which `torch.cuda.graph` would empty each time.

        Raises:
            RuntimeError: the work does what can't be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            # other threads may go on meanwhile
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph.replay, result
