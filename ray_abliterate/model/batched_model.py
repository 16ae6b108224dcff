"""A causal language model whose rows go through in a fixed grid of batches, sorted by length.

What makes batches of rows, chooses between the engine and padded batches, and halves what does not
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
    Cost,
    Tuning,
    even,
    forget_garbage,
    free_bytes,
    is_out_of_memory,
    most_rows,
)
from ray_abliterate.model.engine.batch import Batch
from ray_abliterate.model.engine.engine import Engine, Techniques
from ray_abliterate.model.engine.generation_state import TextFormat
from ray_abliterate.model.engine.packed_attention import NotPackable
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.float32_linears import Upcast, faster_in_float32
from ray_abliterate.model.padded_model import PaddedModel, probe_rows, same_logits
from ray_abliterate.model.prefix_cache import Prefix

log = logging.getLogger(__name__)

DEFAULT_PROMPT, DEFAULT_ANSWER = 512, 256
"""Tokens that batches are made for until more is known."""

Row = list[int]


class BatchedModel:
    """A causal language model that is asked for many rows at a time.

    Attributes:
        module: The transformers model.
        blocks: The residual blocks of the text tower, in order.
        end_tokens: Tokens that end an answer.
        padded: Its padded passes, which serve every model.
        not_packable: Why the engine does not serve this model; empty if it does.
        techniques: What the engine may do to be fast.
        response_prefix: Tokens put after every prompt: what all answers begin with.
    """

    def __init__(
        self,
        module: nn.Module,
        end_tokens: tuple[int, ...],
        pad: int,
        text: TextFormat,
        batch_size: int | None = None,
        share: float = 1.0,
    ) -> None:
        """
        Args:
            module: The transformers model.
            end_tokens: Tokens that end an answer.
            pad: Token that fills rows up; it is masked.
            text: Turns tokens into text.
            batch_size: Rows of a batch; by memory if None.
            share: Of an accelerator, what is for this model: others compute beside it.
        """
        self.module: Any = module
        self.end_tokens = end_tokens
        self.batch_size = batch_size
        self._share = share
        self.upcast = Upcast(module) if faster_in_float32(module) else None
        self.blocks: Any = find_blocks(module)[1]
        self.padded = PaddedModel(module, list(self.blocks), end_tokens, pad)
        self.techniques = Techniques()
        self.response_prefix: tuple[int, ...] = ()
        self._known: dict[Any, list[tuple[list[int], Batch | None]]] = {}
        self._engine, self.not_packable = self._try_engine(text)
        self.use(self.tune(DEFAULT_PROMPT, DEFAULT_ANSWER))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.padded.device

    @property
    def free_bytes(self) -> int:
        """Memory that batches may take."""
        free = free_bytes(self.device)
        return free if self.device.type == "cpu" else int(free * self._share)

    # How it computes

    def tune(self, prompt: int, answer: int, tokens: int = 0, copies: int = 1) -> Tuning:
        """Batch sizes by memory, and whether drafts pay, by measurement.

        Args:
            prompt: Tokens of the longest prompt.
            answer: Tokens of the longest answer.
            tokens: Tokens of all prompts that trials evaluate.
            copies: Trials that share a pass.

        Raises:
            ModelError: not even one row fits.
        """
        free, cost, most = self.free_bytes, self.cost, most_rows(self.device)
        read = min(most, self.batch_size or cost.rows(free, prompt, 0, 1))
        write = min(most, self.batch_size or cost.rows(free, prompt, answer, copies))
        if not read or not write:
            raise ModelError(
                f"{copies} x {prompt} + {answer} tokens do not fit into the {free / 1e9:.1f} GB "
                "that are free.\n  Shorten prompts or answers, lower search.trials_per_pass, or "
                "give the replica more memory."
            )
        states = max(1, tokens) * cost.state * len(self.blocks)
        room = min(LEARNED_SHARE * self.module.num_parameters() * cost.size, free / 4)
        every = min(max(1, math.ceil(states / room)), len(self.blocks))
        return Tuning(read, write, every, self._drafts_pay() if tokens else False, copies)

    def use(self, tuning: Tuning) -> None:
        """Compute so from now on."""
        self._tuning = tuning
        if self._engine is not None:
            self._engine.drafts = tuning.drafts
            self._engine.kept = range(tuning.state_every, len(self.blocks), tuning.state_every)

    @property
    def cost(self) -> Cost:
        """What rows cost in memory."""
        return Cost.of(self.module, self._engine.kept_bytes if self._engine else 0)

    def _drafts_pay(self) -> bool:
        """Whether four tokens of a row cost less than two steps of one: a step waits for weights,
        not for arithmetic."""
        if self._engine is None:
            return False
        rows = min(self._tuning.answer_rows, 64)
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
        """The model is the base model in this block: what it computes is kept for later trials."""
        self._known.clear()
        if self._engine is None:
            yield
            return
        with self._engine.learning():
            yield

    @contextmanager
    def untouched_below(self, block: int) -> Iterator[None]:
        """Blocks below this one are the base model's in this block of code: not run again."""
        if self._engine is None:
            yield
            return
        self._engine.untouched = block
        try:
            yield
        finally:
            self._engine.untouched = 0

    @property
    def packed(self) -> PackedModel:
        """The packed passes, for edits that hook into them.

        Raises:
            ModelError: this model has none.
        """
        if self._engine is None:
            raise ModelError(f"the engine does not serve this model: {self.not_packable}")
        return self._engine.model

    def _one_at_a_time(self, edits: Sequence[int]) -> None:
        if len(edits) > 1:
            raise ModelError(
                "several trials can't share a pass on these prompts: "
                f"{self.not_packable or 'they outgrow the attention window'}.\n"
                "  Set search.trials_per_pass = 1."
            )

    # Batches

    def _each(
        self,
        kind: str,
        rows: Sequence[Row],
        work: Callable[[list[int], Batch | None], None],
        size: int,
        kept: Any,
        more: int = 0,
    ) -> None:
        """Work through a grid of rows, batch by batch; batches that don't fit are halved.

        Args:
            kind: What is asked.
            rows: Token ids.
            work: Computes the rows with these numbers, as a packed batch if there is one.
            size: Rows of a batch.
            kept: Names the rows; the grid, and what the base model computes for it, is kept under
                that name. None keeps nothing.
            more: Tokens that rows grow by.
        """
        if self._engine is not None:
            self._engine.techniques = self.techniques
        key = kind, kept, self.response_prefix, self.techniques.shared_prefix
        grid = self._known.get(key) or [
            (i, self._batch(rows, i, more)) for i in self._grid(rows, size)
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
                    self._engine.decoder.forget()
                forget_garbage()
                half = (len(indices) + 1) // 2
                halves = indices[:half], indices[half:]
                waiting[:0] = [(i, self._batch(rows, i, more)) for i in halves]
            else:
                done.append((indices, batch))
        if kept is not None:
            self._known[key] = done

    def _batch(self, rows: Sequence[Row], indices: Sequence[int], more: int) -> Batch | None:
        """Rows for the engine, if it serves them."""
        some = [rows[i] for i in indices]
        if self._engine is None or max(map(len, some)) + more > self._reach:
            return None
        return self._engine.batch(some)

    def _grid(self, rows: Sequence[Row], size: int) -> Iterator[list[int]]:
        """Batches of row numbers: by length, then number; equal lengths only if padding harms."""
        size = even(len(rows), size) if self.batch_size is None else size
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
    def _reach(self) -> float:
        """Positions that packed passes serve: up to an attention window that they don't know of."""
        window = _window(self.module.config)
        known = self._engine is not None and window in self._engine.windows
        return math.inf if window is None or known else window

    @torch.inference_mode()
    def _try_engine(self, text: TextFormat) -> tuple[Engine | None, str]:
        """The engine, if packed passes give this model's logits; else the reason why not."""
        if not self.padded.pads_safely:
            return None, "padding changes its output, so its state can't be cut into rows"
        try:
            packed = PackedModel(self.module, self.blocks)
            engine = Engine(packed, self.end_tokens, text, len(self.blocks))
            rows = probe_rows(self.module, (12, 17), share=9)
            batch = engine.batch(rows)
            alone = self.padded.logits(rows[:1], 1, Prefix())[0, 0]
            same = same_logits(alone, engine.logits(batch, [1, 1])[0][0][0])
        except (NotPackable, RuntimeError, TypeError, AttributeError, KeyError) as error:
            return None, str(error).splitlines()[0]
        if not same:
            return None, "its attention gives other logits on packed rows"
        return engine, ""


def _window(config: Any) -> int | None:
    """Positions that the narrowest attention window spans, if there is one."""
    text = config.get_text_config(decoder=True)
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=None)
