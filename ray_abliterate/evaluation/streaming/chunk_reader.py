"""One chunk through a model, in as many passes as memory asks for. Knows no texts."""

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
    """Tokens of a pass that fit: by what they cost, and by what has not fitted."""

    def __init__(self, module: object, device: torch.device) -> None:
        self._module, self._device = module, device
        self._most: int | None = None

    def most(self, window: int | None) -> int:
        """For attention that reaches back so far; as far as the model was made for if None."""
        if self._most is None:
            reach = window or trained_positions(getattr(self._module, "config", None)) or CHUNK
            self._most = tokens_per_pass(self._module, self._device, reach)
        return self._most

    def halve(self, size: int) -> int:
        """Half of what did not fit, from now on."""
        self._most = (size + 1) // 2
        log.warning("a pass of %d tokens does not fit; going on with %d", size, self._most)
        return self._most


class ChunkReader:
    """Feeds chunks to a model, and tells the losses of their tokens."""

    def __init__(
        self,
        runner: Runner,
        name: str,
        findings: Capabilities,
        sizes: PassSize,
        positions: int | None,
    ) -> None:
        """
        Args:
            runner: The model.
            name: What it is called in errors.
            findings: What it can carry.
            sizes: Tokens of a pass.
            positions: Positions that it has, if there is a table of them.
        """
        self._runner, self._name, self._findings = runner, name, findings
        self._sizes, self._positions = sizes, positions
        self.kept: TextStates | None = None
        """States of the text that is read, if they are kept."""
        self._inputs: dict[int, list[Tensor]] = {}
        """Of the last chunk's passes, by block."""

    def begin(self, choice: CarryChoice, position: int = 0) -> None:
        """The model has seen nothing; the next token is number `position`."""
        if isinstance(self._runner, ModuleRunner):
            self._runner.window = choice.window
            able = {CarriedContext.KV, CarriedContext.STATE} & set(self._findings.per_pass)
            whole = [self._findings.per_pass[carry] == 0 for carry in able]
            self._runner.splits = choice.carry is not CarriedContext.NONE or any(whole)
            self._runner.start = 0
        self._runner.begin(position)

    def forget(self) -> None:
        """States are neither read nor kept any more."""
        self.kept, self._inputs = None, {}
        if isinstance(self._runner, ModuleRunner):
            self._runner.record, self._runner.states, self._runner.inputs = (), None, {}

    def replay(self, ids: Tensor, choice: CarryChoice) -> None:
        """Feed tokens whose losses are not asked for."""
        size = self._size(choice, len(ids))
        for first in range(0, len(ids), size):
            self._runner.feed(ids[first : first + size], ids[:0])

    def measure(
        self, span: TokenSpan, ids: Tensor, choice: CarryChoice
    ) -> tuple[ChunkResult, Tensor]:
        """A chunk, and the losses of its own tokens; halved passes are tried if memory runs out.

        Raises:
            EvaluationError: a single token does not fit, or a loss is not finite.
            StatesMissing: the model has to see the text before it again.
        """
        self._refuse_far(span.first + len(ids), choice)
        own = span.first + len(ids) - max(span.start, span.first + 1)
        started, size = time.perf_counter(), self._size(choice, len(ids) - 1)
        states = self._begun(span, ids, size, choice)
        kept = self._runner.snapshot()
        while (found := self._in_passes(ids, own, size, states)) is None:
            size = self._halved(size, len(ids) - 1)
            if self.kept is not None:
                self.kept.stop_recording()  # they would be those of other passes
            self._runner.restore(kept)
            release_unused_memory()
        del kept
        self._record(states)
        _refuse_infinite(found, span)
        seconds = time.perf_counter() - started
        carried = 0 if choice.carry is CarriedContext.NONE else self._runner.carried_bytes
        nats, passes = math.fsum(found.double().tolist()), -(-(len(ids) - 1) // size)
        stop = span.first + len(ids)
        result = ChunkResult(span.index, span.start, stop, own, nats, seconds, passes, carried)
        return result, found

    def _begun(self, span: TokenSpan, ids: Tensor, size: int, choice: CarryChoice) -> Tensor | None:
        """The model is ready for a chunk's first pass; states of the chunk, if they are kept."""
        states = None
        if self.kept is not None:
            states = self.kept.known(ids[:-1], even_batch_size(len(ids) - 1, size))
        if isinstance(self._runner, ModuleRunner) and self.kept is not None:
            self._runner.start = 0 if states is None else self.kept.layer
            self._runner.record = self.kept.record if states is None else ()
        if choice.carry is CarriedContext.NONE or (self.kept is not None and span.index == 0):
            self._runner.begin()
        return states

    def _record(self, states: Tensor | None) -> None:
        """Keep what went into blocks in the passes of the last chunk."""
        if self.kept is not None and states is None:
            self.kept.keep({layer: torch.cat(own) for layer, own in self._inputs.items() if own})
        self._inputs = {}

    def _in_passes(self, ids: Tensor, own: int, size: int, states: Tensor | None) -> Tensor | None:
        """Losses of the last `own` tokens; None if memory ran out."""
        count, found = len(ids) - 1, []
        size = even_batch_size(
            count, size
        )  # a last pass of one token is other code in recurrent models
        try:
            for first in range(0, count, size):
                stop = min(first + size, count)
                targets = ids[max(first, count - own) + 1 : stop + 1]
                found.append(self._fed(ids[first:stop], targets, first, states))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return torch.cat(found)

    def _fed(self, ids: Tensor, targets: Tensor, first: int, states: Tensor | None) -> Tensor:
        """One pass of a chunk, from its token `first` on."""
        if not isinstance(self._runner, ModuleRunner):
            return self._runner.feed(ids, targets)
        self._runner.states = None if states is None else states[first : first + len(ids)]
        found = self._runner.feed(ids, targets)
        for layer, inputs in self._runner.inputs.items():
            if not first:
                self._inputs[layer] = []
            self._inputs[layer].append(inputs[0].cpu())
        return found

    def _size(self, choice: CarryChoice, count: int) -> int:
        """Tokens of a pass."""
        if self._findings.per_pass[choice.carry] == 1:
            return 1
        if not self._runner.splits:
            return max(count, 1)
        most = self._sizes.most(choice.window)
        if isinstance(self._runner, ModuleRunner) and not self._runner.head_slices:
            most = min(most, self._runner.rows)
        return max(1, min(count, most))

    def _halved(self, size: int, count: int) -> int:
        if size == 1 or not self._runner.splits:
            what = "a pass of one token" if size == 1 else f"a chunk of {count} tokens"
            raise EvaluationError(
                f"{what} does not fit into memory"
                + ("." if size == 1 else ", and the model can't take it in parts.")
                + "\n  Lower chunk_size, choose another carry, or give the model more memory."
            )
        return self._sizes.halve(size)

    def _refuse_far(self, stop: int, choice: CarryChoice) -> None:
        """Nothing is fed to a position that the model doesn't have."""
        if self._positions is None:
            return
        far = (
            stop - 1 if choice.carry is not CarriedContext.NONE else choice.geometry.chunk_size - 1
        )
        if min(far, stop - 1) > self._positions:
            raise UnsupportedCarry(
                f"the text goes on to position {far}, and {self._name} has "
                f"{self._positions} positions.\n  Set carry = none with chunk_size = "
                f"{self._positions} or less, or max_tokens = {self._positions}."
            )


def _refuse_infinite(losses: Tensor, span: TokenSpan) -> None:
    if not losses.isfinite().all():
        place = int((~losses.isfinite()).nonzero()[0])
        raise EvaluationError(
            f"the loss of token {max(span.start, 1) + place} is {float(losses[place])}.\n"
            "  Are the weights finite? Half precision may overflow; try dtype = float32."
        )
