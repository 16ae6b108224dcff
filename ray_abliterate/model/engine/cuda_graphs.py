"""Decode steps that are recorded once as CUDA graphs and then replayed.

A step of a few rows is some hundred small kernels, and a GPU has finished each before Python has
launched the next. As a graph, a step is one launch. The graph reads the tensors that it was
recorded with, whatever is in them: so keys and values lie in a pool, rows are filled up with idle
ones, and the number of positions that attention looks at is rounded up, which leaves a few graphs
for a whole run. Edited weights are written in place, where graphs see them; the edits of a hook are
tensors of their own, so graphs are recorded anew after a hook changed (`CudaGraphs.invalidate`).

Each graph is checked against the model's own step before it is used. If they differ, or if a model
can't be recorded (some mixtures of experts read values between two kernels), kernels are launched
one by one, as on other devices.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ray_abliterate.model.engine.batch import to_device
from ray_abliterate.model.engine.kv_cache import KVCache, KVCachePool
from ray_abliterate.model.engine.packed_attention import PackedPass
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.padded_model import same_logits

log = logging.getLogger(__name__)

ROW_STEP = 16
"""The rows of a compacted KV cache are a multiple of this, plus one for idle tokens."""
KEY_LENGTH_STEP = 64
"""The positions that attention looks at are a multiple of this."""
MOST_GRAPHS = 64
"""When there are so many, all are dropped, and recorded anew as they are needed."""

GraphShape = tuple[int, int, int]
"""Rows and positions of a KV cache, and the positions that attention looks at."""
Replay = Callable[[], None]
GraphRecorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a function does to tensors. Returns what replays it, and the function's result,
whose memory each replay overwrites. Recording may run the function, or not."""


@dataclass(frozen=True)
class StepInput:
    """What a decode step feeds: the last token of some rows.

    Attributes:
        ids: Token ids.
        rows: The row of the KV cache that each token belongs to.
        positions: The token's position in its row.
        edits: The number of the edit that it is computed with.
    """

    ids: Sequence[int]
    rows: Sequence[int]
    positions: Sequence[int]
    edits: Sequence[int]

    def padded(self, count: int, spare: int) -> "StepInput":
        """Return `count` tokens: these, and idle ones at the beginning of row `spare`."""
        idle = count - len(self.ids)
        return StepInput(
            [*self.ids, *[0] * idle],
            [*self.rows, *[spare] * idle],
            [*self.positions, *[0] * idle],
            [*self.edits, *[0] * idle],
        )

    def columns(self) -> tuple[Sequence[int], ...]:
        """Return ids, rows, positions and edits, in the order of `StepTensors`."""
        return self.ids, self.rows, self.positions, self.edits


StepTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids, rows, positions and edits, each `"row"`. A step replaces ids by the next ones, and adds 1 to
positions."""


@dataclass(frozen=True)
class _Graph:
    """A recorded step, and the tensors that it reads and writes."""

    tensors: StepTensors
    replay: Replay

    def load(self, step_input: StepInput) -> None:
        """Let the next replay continue these rows."""
        for tensor, values in zip(self.tensors, step_input.columns(), strict=True):
            tensor.copy_(to_device(values, tensor.device), non_blocking=True)


class CudaGraphs:
    """The recorded decode steps of one model.

    A step runs the same kernels on the same shapes whether it is replayed or not, so that a trial's
    scores don't depend on what was recorded before it.

    Attributes:
        kv_pool: Where KV caches must lie whose steps are recorded; the last row of such a cache is
            for idle tokens.
        disabled_because: Why steps are not recorded; empty while they are.
    """

    def __init__(self, model: PackedModel, recorder: GraphRecorder | None = None) -> None:
        """
        Args:
            model: The model whose steps are recorded.
            recorder: How they are recorded; as CUDA graphs if None.
        """
        self.kv_pool = KVCachePool()
        self.disabled_because = ""
        self._model = model
        self._record = recorder or CudaGraphRecorder(model.device)
        self._graphs: dict[GraphShape, _Graph] = {}
        self._seen: set[GraphShape] = set()
        self._pool_moves = 0
        self._stale = False

    def padded_rows(self, live: int) -> int:
        """Return the rows of a KV cache for `live` rows: rounded up, and one for idle tokens."""
        return -(-live // ROW_STEP) * ROW_STEP + 1

    def invalidate(self) -> None:
        """Replay no graph that was recorded until now; call it when a hook of the model changed."""
        self._stale = True

    def release(self) -> None:
        """Free the memory of all graphs and of the KV caches."""
        self._graphs.clear()
        self.kv_pool.release()

    @torch.inference_mode()
    def decode(self, kv_cache: KVCache, step_input: StepInput, steps: int) -> Tensor:
        """Return the next `steps` tokens of each row, `"row step"`.

        Args:
            kv_cache: Keys and values of everything before the tokens of `step_input`.
            step_input: The rows' last tokens.
            steps: How many tokens to write.
        """
        key_length = max(step_input.positions) + steps
        key_length = -(-key_length // KEY_LENGTH_STEP) * KEY_LENGTH_STEP
        key_length, live = min(key_length, kv_cache.positions), len(step_input.ids)
        step_input = step_input.padded(kv_cache.rows - 1, kv_cache.rows - 1)
        graph = self._graph(kv_cache, step_input, key_length, live)
        if graph is None:
            tensors = self._tensors(step_input)
            step: Callable[[], object] = partial(self._step, kv_cache, tensors, key_length)
        else:
            graph.load(step_input)
            tensors, step = graph.tensors, graph.replay
        tokens = []
        for _ in range(steps):
            step()
            tokens.append(tensors[0].clone())  # the next replay overwrites it
        return torch.stack(tokens, dim=1)[:live]

    def _tensors(self, step_input: StepInput) -> StepTensors:
        ids, rows, positions, edits = (
            to_device(values, self._model.device).clone() for values in step_input.columns()
        )
        return ids, rows, positions, edits

    def _step(self, kv_cache: KVCache, tensors: StepTensors, key_length: int) -> Tensor:
        """Run one step in place, and return its logits, `"row vocab"`."""
        ids, rows, positions, edits = tensors
        every_token = torch.arange(len(ids), device=ids.device)
        one_token_each = PackedPass(
            ids, rows, positions, every_token, key_length, max_queries=1, edits=edits
        )
        logits, _ = self._model.run(one_token_each, kv_cache)
        ids.copy_(logits.argmax(-1))
        positions.add_(1)
        return logits

    def _graph(
        self, kv_cache: KVCache, step_input: StepInput, key_length: int, live: int
    ) -> _Graph | None:
        """Return the graph for a KV cache of this shape, if there is one.

        It is recorded when the shape comes for the second time: recording costs about three steps.
        """
        moved = self.kv_pool.moves != self._pool_moves
        if moved or self._stale or len(self._graphs) >= MOST_GRAPHS:
            self._graphs.clear()
            self._seen.clear()
            self._pool_moves, self._stale = self.kv_pool.moves, False
        shape = kv_cache.rows, kv_cache.positions, key_length
        if shape in self._seen and shape not in self._graphs and not self.disabled_because:
            try:
                self._record_graph(shape, kv_cache, step_input, live)
            except RuntimeError as error:
                self._disable(str(error).splitlines()[0])
        self._seen.add(shape)
        return self._graphs.get(shape)

    def _record_graph(
        self, shape: GraphShape, kv_cache: KVCache, step_input: StepInput, live: int
    ) -> None:
        """Record a step, and store it if its logits are the model's."""
        tensors, key_length = self._tensors(step_input), shape[-1]
        expected = self._step(kv_cache, tensors, key_length)[:live]  # (row, vocab)
        if not bool(expected.isfinite().all()):
            return  # a broken edit: comparing its logits says nothing about the graph
        replay, logits = self._record(partial(self._step, kv_cache, tensors, key_length))
        graph = _Graph(tensors, replay)
        graph.load(step_input)
        replay()
        if same_logits(expected, logits[:live]):
            self._graphs[shape] = graph
        else:
            self._disable("a recorded step gives other logits")

    def _disable(self, reason: str) -> None:
        self.disabled_because = reason
        self._graphs.clear()
        log.info("decode steps are not recorded as CUDA graphs: %s", reason)


class CudaGraphRecorder:
    """A `GraphRecorder` of CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record a graph without emptying torch's caches, as `torch.cuda.graph` would each time.

        Raises:
            RuntimeError: the work does something that can't be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            # thread_local: other threads may use the device meanwhile
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph.replay, result
