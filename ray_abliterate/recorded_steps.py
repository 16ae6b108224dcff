"""Decode steps that are recorded once and then replayed: on a GPU, CUDA graphs.

A step of a few rows is some hundred small kernels, and a GPU has done each before Python has
launched the next. Recorded, a step is one launch. It then reads the tensors it was recorded with,
whatever is in them: so keys and values lie in an arena, rows are filled up with idle ones, and the
positions that are looked at are rounded up, which leaves a few recordings for a whole run. Edited
weights are written in place; edits beside the weights are tensors of their own, and recordings of
earlier ones are forgotten.

Whether a recording does what the model does is seen before it is used; if not, or if a model can't
be recorded (it looks at values between two kernels, as many mixtures of experts do), steps are
launched one by one, as elsewhere.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.beside import EditedLayer
from ray_abliterate.feeding import on_device
from ray_abliterate.packed import PackedModel
from ray_abliterate.packed_attention import Pass
from ray_abliterate.padded import same_logits
from ray_abliterate.slabs import Arena, Slab

log = logging.getLogger(__name__)

ROW_STEP = 16
"""Rows of a slab that has been compacted are a multiple of this, one more for idle rows aside."""
REACH_STEP = 64
"""So are the positions that a step looks at."""
MOST_RECORDINGS = 64
"""Then all are forgotten, and made anew as they are needed."""

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


@dataclass(frozen=True)
class _Recording:
    """A step, and the tensors it reads: token ids first, which it replaces by the next ones."""

    inputs: tuple[Tensor, ...]
    replay: Replay

    def load(self, tip: Tip) -> None:
        """The next replay continues these."""
        for held, values in zip(self.inputs, tip.columns(), strict=True):
            held.copy_(on_device(values, held.device), non_blocking=True)


class RecordedSteps:
    """The recorded steps of one model.

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
        self._record = record or CudaGraphs()
        self._known: dict[tuple[int, ...], _Recording] = {}
        self._valid_for = 0, 0

    def room(self, live: int) -> int:
        """Rows of a slab for so many live ones."""
        return -(-live // ROW_STEP) * ROW_STEP + 1

    def forget(self) -> None:
        """Give all memory back."""
        self._known.clear()
        self.arena.clear()

    @torch.inference_mode()
    def tokens(self, slab: Slab, tip: Tip, steps: int) -> Tensor | None:
        """So many tokens of each row, one after the other, `"row step"`; None if these steps can't
        be replayed."""
        if self.off:
            return None
        reach = -(-(1 + max(tip.positions) + steps - 1) // REACH_STEP) * REACH_STEP
        reach, live = min(reach, slab.positions), len(tip.ids)
        tip = tip.filled(slab.rows - 1, slab.rows - 1)
        recording = self._recording(slab, tip, reach, live)
        if recording is None:
            return None
        recording.load(tip)
        found = []
        for _ in range(steps):
            recording.replay()
            found.append(recording.inputs[0].clone())
        return torch.stack(found, dim=1)[:live]

    def _recording(self, slab: Slab, tip: Tip, reach: int, live: int) -> _Recording | None:
        """The one for a slab of this shape, made now if there is none."""
        valid_for = self.arena.moves, EditedLayer.changes
        if valid_for != self._valid_for or len(self._known) >= MOST_RECORDINGS:
            self._known.clear()
            self._valid_for = valid_for
        key = slab.rows, slab.positions, reach
        if key not in self._known:
            try:
                made = self._make(slab, tip, reach, live)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0])
                return None
            if made is None:
                return None
            self._known[key] = made
        return self._known[key]

    def _make(self, slab: Slab, tip: Tip, reach: int, live: int) -> _Recording | None:
        """Record a step, and see whether it does what the model does."""
        device = self._model.device
        inputs = tuple(on_device(values, device).clone() for values in tip.columns())
        ids, rows, positions, edits = inputs

        def step() -> Tensor:
            every = torch.arange(len(ids), device=device)
            given = Pass(ids, rows, positions, every, reach, 1, edits=edits)
            return self._model.run(given, slab)[0]

        def advance() -> Tensor:
            logits = step()
            ids.copy_(logits.argmax(-1))
            positions.add_(1)
            return logits

        expected = step()[:live]
        if not bool(expected.isfinite().all()):
            return None  # a broken edit: nothing can be told by it
        replay, logits = self._record(advance)
        recording = _Recording(inputs, replay)
        recording.load(tip)
        replay()
        if not same_logits(expected, logits[:live]):
            self._give_up("a recorded step gives other logits")
            return None
        return recording

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._known.clear()
        log.info("decode steps are not recorded: %s", reason)


class CudaGraphs:
    """Records CUDA graphs, which share the memory of what they compute in between."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """See `Recorder`.

        Raises:
            RuntimeError: the work does what can't be recorded.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads may go on meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own behind
        return graph.replay, result
