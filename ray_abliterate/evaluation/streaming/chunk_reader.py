"""Reads one chunk with a model, in as many passes as memory requires. Knows no texts."""

import logging
import math
import time

import torch
from torch import Tensor

from ray_abliterate.errors import EvaluationError, UnsupportedCarry
from ray_abliterate.evaluation.streaming.capability_check import Capabilities
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CHUNK, CarryChoice, trained_positions
from ray_abliterate.evaluation.streaming.chunk_geometry import TokenSpan
from ray_abliterate.evaluation.streaming.hidden_state_cache import TextStates
from ray_abliterate.evaluation.streaming.pass_size import tokens_per_pass
from ray_abliterate.evaluation.streaming.results import ChunkResult
from ray_abliterate.evaluation.streaming.runners import ModuleRunner, Runner
from ray_abliterate.model.batch_size import even_batch_size
from ray_abliterate.model.devices import is_out_of_memory, release_unused_memory

log = logging.getLogger(__name__)


class PassSize:
    """How many tokens fit into a pass: estimated from their cost, lowered by what did not fit."""

    def __init__(self, module: object, device: torch.device) -> None:
        self._module, self._device = module, device
        self._max_tokens: int | None = None

    def max_tokens(self, window: int | None) -> int:
        """Return how many tokens fit into a pass.

        Args:
            window: Tokens that attention reaches back to; as many as the model was made for if
                None.
        """
        if self._max_tokens is None:
            reach = window or trained_positions(getattr(self._module, "config", None)) or CHUNK
            self._max_tokens = tokens_per_pass(self._module, self._device, reach)
        return self._max_tokens

    def halve(self, size: int) -> int:
        """Return half of a size that did not fit, and allow no more from now on."""
        self._max_tokens = (size + 1) // 2
        log.warning(
            "a pass of %d tokens does not fit into memory; passes now have %d",
            size,
            self._max_tokens,
        )
        return self._max_tokens


class ChunkReader:
    """Feeds chunks to a model, and returns the losses of their tokens.

    Attributes:
        runner: The model.
        text_states: Cached states of the text that is read, if there is a cache.
    """

    def __init__(
        self,
        runner: Runner,
        name: str,
        capabilities: Capabilities,
        sizes: PassSize,
        position_limit: int | None,
    ) -> None:
        """
        Args:
            runner: The model.
            name: What errors call the model.
            capabilities: What it can carry.
            sizes: How many tokens fit into a pass.
            position_limit: Positions that the model has, if there is a limit.
        """
        self.runner, self._name, self._capabilities = runner, name, capabilities
        self._sizes, self._position_limit = sizes, position_limit
        self.text_states: TextStates | None = None
        self._block_inputs: dict[int, list[Tensor]] = {}
        """Inputs of the recorded blocks in the passes of the chunk, by block, `"token hidden"`."""

    def begin(self, choice: CarryChoice, position: int = 0) -> None:
        """Let the model forget all it has seen; the next token is number `position`."""
        if isinstance(self.runner, ModuleRunner):
            limits = self._capabilities.pass_limits
            self.runner.window = choice.window
            exact = {CarriedContext.KV, CarriedContext.STATE} & set(limits)
            any_length = any(limits[carry] == 0 for carry in exact)
            self.runner.multi_pass = choice.carry is not CarriedContext.NONE or any_length
            self.runner.start_block = 0
        self.runner.begin(position)

    def drop_states(self) -> None:
        """Neither read nor store hidden states any more."""
        self.text_states, self._block_inputs = None, {}
        if isinstance(self.runner, ModuleRunner):
            self.runner.recorded_blocks = ()
            self.runner.start_states, self.runner.block_inputs = None, {}

    def replay(self, ids: Tensor, choice: CarryChoice) -> None:
        """Feed tokens without computing their losses."""
        size = self._pass_size(choice, len(ids))
        for first in range(0, len(ids), size):
            self.runner.feed(ids[first : first + size], ids[:0])

    def read(self, span: TokenSpan, ids: Tensor, choice: CarryChoice) -> tuple[ChunkResult, Tensor]:
        """Read a chunk; if memory runs out, read it again in passes half as long.

        Args:
            span: Where the chunk lies.
            ids: Its tokens from `span.first` on, fewer than the span's at the end of the text.
            choice: How the text is read.

        Returns:
            The result, and the losses of the tokens that belong to the chunk.

        Raises:
            EvaluationError: a single token does not fit, or a loss is not finite.
            UnsupportedCarry: the text goes on beyond the model's positions.
            StatesMissing: the model has to see the text before the chunk again.
        """
        self._refuse_beyond_limit(span.first + len(ids), choice)
        predicted = span.first + len(ids) - max(span.start, span.first + 1)
        started, size = time.perf_counter(), self._pass_size(choice, len(ids) - 1)
        states = self._prepare(span, ids, size, choice)
        snapshot = self.runner.snapshot()
        while (losses := self._in_passes(ids, predicted, size, states)) is None:
            size = self._halve(size, len(ids) - 1)
            if self.text_states is not None:
                self.text_states.stop_recording()  # states of other passes are other bits
            self.runner.restore(snapshot)
            release_unused_memory()
        del snapshot
        self._store_states(states)
        _refuse_infinite(losses, span)
        seconds = time.perf_counter() - started
        carried = 0 if choice.carry is CarriedContext.NONE else self.runner.carried_bytes
        nats, passes = math.fsum(losses.double().tolist()), -(-(len(ids) - 1) // size)
        stop = span.first + len(ids)
        result = ChunkResult(
            span.index, span.start, stop, predicted, nats, seconds, passes, carried
        )
        return result, losses

    def _prepare(
        self, span: TokenSpan, ids: Tensor, size: int, choice: CarryChoice
    ) -> Tensor | None:
        """Prepare the model for a chunk's first pass; return cached states of the chunk, if any."""
        states = None
        if self.text_states is not None:
            states = self.text_states.look_up(ids[:-1], even_batch_size(len(ids) - 1, size))
        if isinstance(self.runner, ModuleRunner) and self.text_states is not None:
            self.runner.start_block = 0 if states is None else self.text_states.start_block
            recorded = self.text_states.recorded_blocks if states is None else ()
            self.runner.recorded_blocks = recorded
        first_with_states = self.text_states is not None and span.index == 0
        if choice.carry is CarriedContext.NONE or first_with_states:
            self.runner.begin()
        return states

    def _store_states(self, states: Tensor | None) -> None:
        """Store what went into blocks in the passes of the last chunk, if it was computed."""
        if self.text_states is not None and states is None:
            inputs = self._block_inputs.items()
            self.text_states.store({block: torch.cat(parts) for block, parts in inputs if parts})
        self._block_inputs = {}

    def _in_passes(
        self, ids: Tensor, predicted: int, size: int, states: Tensor | None
    ) -> Tensor | None:
        """Return the losses of the last `predicted` tokens; None if memory runs out."""
        count, losses = len(ids) - 1, []
        # recurrent models have other code for a last pass of a single token
        size = even_batch_size(count, size)
        try:
            for first in range(0, count, size):
                stop = min(first + size, count)
                targets = ids[max(first, count - predicted) + 1 : stop + 1]
                losses.append(self._feed(ids[first:stop], targets, first, states))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return torch.cat(losses)

    def _feed(self, ids: Tensor, targets: Tensor, first: int, states: Tensor | None) -> Tensor:
        """Run one pass of a chunk, from the chunk's token `first` on."""
        if not isinstance(self.runner, ModuleRunner):
            return self.runner.feed(ids, targets)
        self.runner.start_states = None if states is None else states[first : first + len(ids)]
        losses = self.runner.feed(ids, targets)
        for block, inputs in self.runner.block_inputs.items():
            if not first:
                self._block_inputs[block] = []
            self._block_inputs[block].append(inputs[0].cpu())
        return losses

    def _pass_size(self, choice: CarryChoice, count: int) -> int:
        """Return how many of `count` tokens go into a pass."""
        if self._capabilities.pass_limits[choice.carry] == 1:
            return 1
        if not self.runner.multi_pass:
            return max(count, 1)
        most = self._sizes.max_tokens(choice.window)
        if isinstance(self.runner, ModuleRunner) and not self.runner.slices_logits:
            most = min(most, self.runner.logit_rows)
        return max(1, min(count, most))

    def _halve(self, size: int, count: int) -> int:
        if size == 1 or not self.runner.multi_pass:
            what = "a pass of one token" if size == 1 else f"a chunk of {count} tokens"
            raise EvaluationError(
                f"{what} does not fit into memory"
                + ("." if size == 1 else ", and the model can't take it in parts.")
                + "\n  Lower chunk_size, choose another carry, or give the model more memory."
            )
        return self._sizes.halve(size)

    def _refuse_beyond_limit(self, stop: int, choice: CarryChoice) -> None:
        """Refuse to feed a token to a position that the model doesn't have."""
        limit = self._position_limit
        if limit is None:
            return
        carried = choice.carry is not CarriedContext.NONE
        last = stop - 1 if carried else choice.geometry.chunk_size - 1
        if min(last, stop - 1) > limit:
            raise UnsupportedCarry(
                f"the text goes on to position {last}, and {self._name} has {limit} positions.\n"
                f"  Set carry = none with chunk_size = {limit} or less, or max_tokens = {limit}."
            )


def _refuse_infinite(losses: Tensor, span: TokenSpan) -> None:
    if not losses.isfinite().all():
        offset = int((~losses.isfinite()).nonzero()[0])
        raise EvaluationError(
            f"the loss of token {max(span.start, 1) + offset} is {float(losses[offset])}.\n"
            "  Are the weights finite? Half precision may overflow; try dtype = float32."
        )
