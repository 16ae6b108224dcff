"""A causal language model whose rows go through in a fixed grid of batches, sorted by length.

It makes batches of rows, chooses between the engine and padded batches, and halves what does not
fit. Knows token ids; nothing about texts, edits or scores.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import find_blocks
from ray_abliterate.model.batch_size import (
    LEARNED_SHARE,
    MemoryCost,
    Tuning,
    even_batch_size,
    most_rows,
)
from ray_abliterate.model.devices import free_bytes, is_out_of_memory, release_unused_memory
from ray_abliterate.model.engine.batch import Batch
from ray_abliterate.model.engine.engine import Engine, Techniques
from ray_abliterate.model.engine.generation_state import TextDecoder
from ray_abliterate.model.engine.packed_attention import NotPackable
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.float32_linears import Float32Linears, is_faster_in_float32
from ray_abliterate.model.padded_model import PaddedModel, probe_rows, same_logits
from ray_abliterate.model.prefix_cache import Prefix

log = logging.getLogger(__name__)

DEFAULT_PROMPT, DEFAULT_ANSWER = 512, 256
"""Tokens that batches are sized for until a run's prompts are known."""
TIMED_ROWS = 64
"""Rows at most of the passes that are timed to see whether speculative decoding pays."""

PromptRow = list[int]
"""Token ids of one prompt, and what else is fed after it."""


class BatchedModel:
    """A causal language model that computes many rows at a time.

    Attributes:
        module: The transformers model.
        blocks: The residual blocks of the text tower, in order.
        end_tokens: Tokens that end an answer.
        batch_size: Rows of a batch, if they are not chosen by memory.
        padded: Its padded passes, which serve every model.
        not_packable: Why the engine does not serve this model; empty if it does.
        techniques: What the engine may do to be fast.
        float32_linears: Copies of its linear layers that compute in float32, on CPUs that are
            faster at it.
        response_prefix: Tokens that follow every prompt: what all answers begin with.
    """

    def __init__(
        self,
        module: nn.Module,
        end_tokens: tuple[int, ...],
        pad: int,
        text: TextDecoder,
        batch_size: int | None = None,
        share: float = 1.0,
    ) -> None:
        """
        Args:
            module: The transformers model.
            end_tokens: Tokens that end an answer.
            pad: The token that fills rows up; it is masked.
            text: Turns tokens into text.
            batch_size: Rows of a batch; by memory if None.
            share: This model's share of an accelerator that others compute on, too.
        """
        self.module: Any = module
        self.end_tokens = end_tokens
        self.batch_size = batch_size
        self._share = share
        self.float32_linears = Float32Linears(module) if is_faster_in_float32(module) else None
        self.blocks: Any = find_blocks(module)[1]
        self.padded = PaddedModel(module, list(self.blocks), end_tokens, pad)
        self.techniques = Techniques()
        self.response_prefix: tuple[int, ...] = ()
        # by question and rows: each batch's row numbers, and what was computed for it
        self._stored_batches: dict[Any, list[tuple[list[int], Batch | None]]] = {}
        self._engine, self.not_packable = self._try_engine(text)
        self.use(self.tune(DEFAULT_PROMPT, DEFAULT_ANSWER))

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return self.padded.device

    @property
    def free_bytes(self) -> int:
        """The bytes of memory that batches may take now."""
        free = free_bytes(self.device)
        return free if self.device.type == "cpu" else int(free * self._share)

    @property
    def memory_cost(self) -> MemoryCost:
        """What tokens and rows cost in memory."""
        return MemoryCost.of(self.module, self._engine.kv_bytes_per_token if self._engine else 0)

    @property
    def packed(self) -> PackedModel:
        """The packed passes, for edits that differ from token to token.

        Raises:
            ModelError: the engine does not serve this model.
        """
        if self._engine is None:
            raise ModelError(f"the engine does not serve this model: {self.not_packable}")
        return self._engine.model

    # How it computes

    def tune(self, prompt: int, answer: int, tokens: int = 0, copies: int = 1) -> Tuning:
        """Choose batch sizes by memory, and speculative decoding by measurement.

        Args:
            prompt: Tokens of the longest prompt.
            answer: Tokens of the longest answer.
            tokens: Tokens of all prompts that trials evaluate; 0 if there are no trials.
            copies: Trials that share a pass.

        Raises:
            ModelError: not even one row fits.
        """
        free, cost, most = self.free_bytes, self.memory_cost, most_rows(self.device)
        read_rows = min(most, self.batch_size or cost.rows(free, prompt, 0, 1))
        answer_rows = min(most, self.batch_size or cost.rows(free, prompt, answer, copies))
        if not read_rows or not answer_rows:
            raise ModelError(
                f"{copies} x {prompt} + {answer} tokens do not fit into the {free / 1e9:.1f} GB "
                "that are free.\n  Shorten prompts or answers, lower search.trials_per_pass, or "
                "give the replica more memory."
            )
        states = max(1, tokens) * cost.state * len(self.blocks)
        room = min(LEARNED_SHARE * self.module.num_parameters() * cost.element, free / 4)
        state_every = min(max(1, math.ceil(states / room)), len(self.blocks))
        drafts = self._speculation_pays() if tokens else False
        return Tuning(read_rows, answer_rows, state_every, drafts, copies)

    def use(self, tuning: Tuning) -> None:
        """Compute with these batch sizes from now on."""
        self._tuning = tuning
        if self._engine is not None:
            every = tuning.state_every
            self._engine.speculative = tuning.drafts
            self._engine.stored_blocks = range(every, len(self.blocks), every)

    def _speculation_pays(self) -> bool:
        """Return whether a pass of four tokens a row takes less than two passes of one.

        It does where a pass waits for weights, not for arithmetic.
        """
        if self._engine is None:
            return False
        rows = min(self._tuning.answer_rows, TIMED_ROWS)
        batches = [Batch([[3 + i % 7] * length for i in range(rows)]) for length in (1, 4)]
        seconds = [math.inf, math.inf]
        for _ in range(3):  # in turns: the machine may be busy for a while
            for number, batch in enumerate(batches):
                started = time.perf_counter()
                self._engine.logits(batch, [1] * rows)[0][0].cpu()
                seconds[number] = min(seconds[number], time.perf_counter() - started)
        return seconds[1] < 2 * seconds[0]

    # What the base model computed, and what is edited now

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Store what is computed inside the block for later trials; the model is the base model."""
        self._stored_batches.clear()
        if self._engine is None:
            yield
            return
        with self._engine.learning():
            yield

    @contextmanager
    def untouched_below(self, block: int) -> Iterator[None]:
        """Reuse the base model's states of the blocks below this one inside the `with` block."""
        if self._engine is None:
            yield
            return
        self._engine.untouched = block
        try:
            yield
        finally:
            self._engine.untouched = 0

    def invalidate_graphs(self) -> None:
        """Record CUDA graphs anew, because a hook that edits a layer of this model changed."""
        if self._engine is not None:
            self._engine.decoder.invalidate_graphs()

    def _refuse_several(self, edits: Sequence[int]) -> None:
        """Raise a `ModelError` if several edits should share a padded pass, which has only one."""
        if len(edits) > 1:
            raise ModelError(
                "several trials can't share a pass on these prompts: "
                f"{self.not_packable or 'they outgrow the attention window'}.\n"
                "  Set search.trials_per_pass = 1."
            )

    # Batches

    def _for_each_batch(
        self,
        question: str,
        rows: Sequence[PromptRow],
        work: Callable[[list[int], Batch | None], None],
        size: int,
        stored_as: Any,
        growth: int = 0,
    ) -> None:
        """Work through a grid of rows, batch by batch; batches that don't fit are halved.

        Args:
            question: What is asked of the rows.
            rows: Token ids.
            work: Computes the rows with these numbers, as a packed batch if there is one.
            size: Rows of a batch.
            stored_as: Names the rows; the grid, and what the base model computes for it, is stored
                under that name. None stores nothing.
            growth: Tokens that rows grow by.
        """
        if self._engine is not None:
            self._engine.techniques = self.techniques
        key = question, stored_as, self.response_prefix, self.techniques.shared_prefix
        grid = self._stored_batches.get(key) or [
            (indices, self._batch(rows, indices, growth)) for indices in self._grid(rows, size)
        ]
        waiting, done = list(grid), []
        while waiting:
            indices, batch = waiting.pop(0)
            try:
                work(indices, batch)
            except (RuntimeError, MemoryError) as error:
                if len(indices) == 1 or not is_out_of_memory(error):
                    raise
                log.warning("%d rows do not fit; going on with half as many", len(indices))
                if self._engine is not None:
                    self._engine.decoder.release_memory()
                release_unused_memory()
                half = (len(indices) + 1) // 2
                halves = indices[:half], indices[half:]
                waiting[:0] = [(part, self._batch(rows, part, growth)) for part in halves]
            else:
                done.append((indices, batch))
        if stored_as is not None:
            self._stored_batches[key] = done

    def _batch(
        self, rows: Sequence[PromptRow], indices: Sequence[int], growth: int
    ) -> Batch | None:
        """Return some rows as a batch for the engine, if it serves them."""
        some = [rows[i] for i in indices]
        if self._engine is None or max(map(len, some)) + growth > self._packed_length:
            return None
        return self._engine.batch(some)

    def _grid(self, rows: Sequence[PromptRow], size: int) -> Iterator[list[int]]:
        """Yield batches of row numbers, by length, then number.

        A batch holds rows of one length only where padding would change the model's output.
        """
        size = even_batch_size(len(rows), size) if self.batch_size is None else size
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        batch: list[int] = []
        for index in order:
            full = len(batch) == size
            mixed = batch and len(rows[batch[0]]) != len(rows[index])
            if full or (mixed and not self.padded.pads_safely):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @property
    def _packed_length(self) -> float:
        """The longest row that packed passes serve, in tokens.

        A window that is in the configuration but that packed attention was never asked for is one
        that it would ignore.
        """
        window = _narrowest_window(self.module.config)
        known = self._engine is not None and window in self._engine.windows
        return math.inf if window is None or known else window

    @torch.inference_mode()
    def _try_engine(self, text: TextDecoder) -> tuple[Engine | None, str]:
        """Return the engine if packed passes give this model's logits, else the reason why not."""
        if not self.padded.pads_safely:
            return None, "padding changes its output, so its state can't be cut into rows"
        try:
            packed = PackedModel(self.module, self.blocks)
            engine = Engine(packed, self.end_tokens, text, len(self.blocks))
            rows = probe_rows(self.module, (12, 17, 14), share=9)
            packed_logits = engine.logits(engine.batch(rows), [1, 1, 1])[0]
            # Every row, not the first alone: a recurrent or convolutional state would run from a
            # row into those behind it, and the first has nothing before it.
            same = all(
                same_logits(self.padded.logits([row], 1, Prefix())[0, 0], logits[0])  # (vocab,)
                for row, logits in zip(rows, packed_logits, strict=True)
            )
        except (NotPackable, RuntimeError, TypeError, AttributeError, KeyError) as error:
            return None, str(error).splitlines()[0]
        if not same:
            return None, "its attention gives other logits on packed rows"
        return engine, ""


def _narrowest_window(config: Any) -> int | None:
    """Return the positions that the narrowest attention window spans, if there is one."""
    text = config.get_text_config(decoder=True)
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=None)
