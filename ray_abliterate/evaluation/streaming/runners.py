"""Runs a model over a text, pass by pass, and returns the loss of each token.

There is a runner for the models of transformers, and one for models that carry a state of their
own. A pass ends at the final hidden states; logits are made from slices of them, so that those of a
whole pass never exist.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ray_abliterate.errors import EvaluationError, UnknownArchitecture
from ray_abliterate.evaluation.streaming.cache_state import (
    cache_bytes,
    export_cache,
    import_cache,
    restore_cache,
    snapshot_cache,
    with_stand_in_layers,
)
from ray_abliterate.evaluation.streaming.pass_size import slice_rows
from ray_abliterate.model.architecture import find_blocks
from ray_abliterate.model.engine.layer_skipping import record_block_inputs, start_at_block


@runtime_checkable
class StatefulModel(Protocol):
    """A model that carries its own state from call to call."""

    def __call__(self, input_ids: Tensor) -> Any:
        """Return logits `"1 token vocab"`, or an object with such `logits`; advance the state."""

    def get_state(self) -> Any:
        """Return the state; the caller copies it."""

    def set_state(self, state: Any) -> None:
        """Continue from the given state."""

    def reset_state(self) -> None:
        """Continue as if no token had been seen."""


class Runner(Protocol):
    """One model, and what it remembers of the text that it has been fed.

    Attributes:
        device: Where token ids go.
        vocab: Number of token ids; all ids are below it.
        carried_bytes: Memory of what the model remembers of the text.
        multi_pass: A text may be fed in several passes.
    """

    device: torch.device
    vocab: int
    multi_pass: bool

    @property
    def carried_bytes(self) -> int:
        """Return the memory of what the model remembers of the text."""

    def begin(self, position: int = 0) -> None:
        """Forget the text; the next token is number `position`."""

    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run one pass, and return the losses of the last tokens.

        Args:
            ids: Tokens that go into the model, `"token"`.
            targets: The tokens that follow the last `len(targets)` of `ids`.

        Returns:
            The losses of `targets` in nats, `"target"`, float32 on the CPU.
        """

    def snapshot(self) -> Any:
        """Return what `restore` needs to come back to this point of the text."""

    def restore(self, snapshot: Any) -> None:
        """Return to where a snapshot was taken; it can be restored any number of times."""

    def export(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Return what is remembered of the text, for a file; None if it can't be written."""

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Continue from what was exported; return whether that is possible."""


class ModuleRunner:
    """Runs a causal language model of transformers.

    Attributes:
        window: Tokens that attention reaches back to; None leaves the model's own reach.
        start_block: Block that passes begin at, from the next `begin` on.
        start_states: Input of that block in the next pass, `"token hidden"`.
        recorded_blocks: Blocks whose inputs are recorded.
        block_inputs: Their inputs in the last pass, by block, `"1 token hidden"`.
        blocks_return_tuples: Blocks return tuples rather than hidden states alone.
        logit_rows: Positions whose logits exist at a time.
        slices_logits: Logits can be made from slices of the hidden states.
    """

    def __init__(self, module: Any) -> None:
        embedding = module.get_input_embeddings().weight  # (vocab, hidden)
        self.module, self.device, self.vocab = module, embedding.device, int(embedding.shape[0])
        self.window: int | None = None
        self.multi_pass = True
        self.cache: Any = None
        self._body, self._body_name = _find_body(module)
        accepted = set(inspect.signature(self._body.forward).parameters)
        names = [name for name in ("past_key_values", "cache_params") if name in accepted]
        self.cache_name = names[0] if names else ""
        self._takes_positions = "position_ids" in accepted
        self._offset, self._fed = 0, 0
        self.start_block = 0
        self.start_states: Tensor | None = None
        self.recorded_blocks: tuple[int, ...] = ()
        self.block_inputs: dict[int, Tensor] = {}
        self.blocks_return_tuples = False
        self.logit_rows = slice_rows(self.vocab, self.device)
        self.slices_logits = bool(self._body_name)

    @property
    def carried_bytes(self) -> int:
        """Return the memory of the cache."""
        return cache_bytes(self.cache) if self.cache is not None else 0

    def begin(self, position: int = 0) -> None:
        """Forget the text; the next token is number `position`."""
        self._offset, self._fed, self.cache = position, 0, None
        if self.window is not None:
            from ray_abliterate.evaluation.streaming.sliding_window import bounded_cache

            self.cache = bounded_cache(self.module.config, self.window)
        if self.start_block and self.cache_name and self.multi_pass:
            self.cache = with_stand_in_layers(self._cache_or_new(), self.start_block)

    def _cache_or_new(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.module.config) if self.cache is None else self.cache

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks; none if the architecture is unknown."""
        try:
            return list(find_blocks(self.module)[1])
        except UnknownArchitecture:
            return []

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run one pass, and return the losses of `targets`; see `Runner.feed`."""
        ids, count = ids.to(self.device), len(targets)
        if not self.slices_logits and count:
            return _token_losses(self._all_logits(ids)[len(ids) - count :], targets)
        hidden = self._run_pass(self._body, ids)[0][0]  # (token, hidden)
        self._fed += len(ids)
        losses = [torch.empty(0)]
        first = len(ids) - count
        for begin in range(0, count, self.logit_rows):
            part = slice(first + begin, first + min(begin + self.logit_rows, count))
            with self._precomputed(hidden[None, part]):
                logits = self.module(input_ids=ids[None, part], use_cache=False).logits[0]
            losses.append(_token_losses(logits, targets[begin : begin + self.logit_rows]))
        return torch.cat(losses)

    def _all_logits(self, ids: Tensor) -> Tensor:
        """Return the logits of a whole pass, `"token vocab"`."""
        output = self._run_pass(self.module, ids)
        self._fed += len(ids)
        logits: Tensor = output.logits[0]
        return logits

    def _run_pass(self, part: Any, ids: Tensor) -> Any:
        """Run the model, or its body, on ids `"token"`, with its cache and what is recorded."""
        from ray_abliterate.evaluation.streaming.sliding_window import limit_attention

        options: dict[str, Any] = {"use_cache": bool(self.cache_name) and self.multi_pass}
        if options["use_cache"]:
            options[self.cache_name] = self.cache
        if self._takes_positions:  # not every model counts on from its cache
            seen = self._offset + self._fed
            options["position_ids"] = torch.arange(seen, seen + len(ids), device=self.device)[None]
        states, block_inputs = self.start_states, dict[int, Tensor]()
        if self.start_block:
            assert states is not None
            states = states.to(self.device)[None]  # (1, token, hidden)
        with (
            limit_attention(self.window),
            start_at_block(self.blocks, self.start_block, states, self.blocks_return_tuples),
            record_block_inputs(self.blocks, self.recorded_blocks, block_inputs),
        ):
            output = part(input_ids=ids[None], **options)
        if options["use_cache"]:
            self.cache = getattr(output, self.cache_name, None)
            if self.cache is None:
                raise EvaluationError(f"{type(self.module).__name__} returns no cache.")
        self.block_inputs = block_inputs
        return output

    @contextmanager
    def _precomputed(self, hidden: Tensor) -> Iterator[None]:
        """Let the model's body return `hidden`, which it has just computed, in this block.

        What stands between hidden states and logits (a scale, a soft cap) is the model's own code.
        """
        setattr(self.module, self._body_name, _PrecomputedBody(hidden, self._body))
        try:
            yield
        finally:
            setattr(self.module, self._body_name, self._body)

    def snapshot(self) -> Any:
        """Return what `restore` needs to come back to this point of the text."""
        return self._fed, snapshot_cache(self.cache)

    def restore(self, snapshot: Any) -> None:
        """Return to where a snapshot was taken; it can be restored any number of times."""
        self._fed, cache = snapshot
        self.cache = restore_cache(self.cache, cache)

    def export(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Return the cache for a file; None if it can't be written, or lacks the lower blocks."""
        if self.cache is None or self.start_block:
            return None
        exported = export_cache(self.cache)
        if exported is None:
            return None
        tensors, rest = exported
        return tensors, [*rest, {"kind": "position", "offset": self._offset, "fed": self._fed}]

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Continue from what was exported; return whether that is possible."""
        position = rest[-1]
        self.begin(position["offset"])
        cache = self._cache_or_new()
        if not import_cache(cache, tensors, rest[:-1], self.device):
            self.begin()
            return False
        self.cache, self._fed = cache, position["fed"]
        return True


class StatefulRunner:
    """Runs a model that carries its own state."""

    multi_pass = True

    def __init__(self, model: StatefulModel, vocab: int) -> None:
        self._model, self.vocab = model, vocab
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        first = next(parameters, None)
        self.device = torch.device("cpu") if first is None else first.device

    @property
    def carried_bytes(self) -> int:
        """Return the memory of the tensors in the state."""
        return cache_bytes(self._model.get_state())

    def begin(self, position: int = 0) -> None:
        """Forget the text; such a model counts its own positions, so `position` is ignored."""
        self._model.reset_state()

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run one pass, and return the losses of `targets`; see `Runner.feed`."""
        output = self._model(ids.to(self.device)[None])
        logits = output if isinstance(output, Tensor) else output.logits  # (1, token, vocab)
        return _token_losses(logits[0, len(ids) - len(targets) :], targets)

    def snapshot(self) -> Any:
        """Return a copy of the state."""
        return copy.deepcopy(self._model.get_state())

    def restore(self, snapshot: Any) -> None:
        """Return to where a snapshot was taken."""
        self._model.set_state(copy.deepcopy(snapshot))

    def export(self) -> None:
        """Return None: only the model knows what its state is made of, so it is recomputed."""

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Return False: such a state is never written to a file."""
        return False


class _PrecomputedBody(nn.Module):
    """Takes the place of a model's body, and returns what the body has already computed."""

    def __init__(self, hidden: Tensor, body: Any) -> None:
        super().__init__()
        self._hidden = hidden
        self.__dict__["_replaced_body"] = body  # not as a submodule

    def forward(self, *_args: Any, **_options: Any) -> "_BodyOutput":
        """Return the same hidden states, whatever the arguments."""
        return _BodyOutput(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced_body"], name)


class _BodyOutput:
    """The output of a model's body, of which only the hidden states exist."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target, `"target"`, from logits `"target vocab"`."""
    wanted = targets.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu()


def _find_body(module: Any) -> tuple[Any, str]:
    """Return the part that computes hidden states, and its name.

    Where there is no such part, it is the whole model, and the name is empty.
    """
    name = getattr(module, "base_model_prefix", "")
    body = getattr(module, name, None) if name else None
    return (body, name) if isinstance(body, nn.Module) and body is not module else (module, "")
