"""Feeds tokens to a model and tells the loss of each: transformers models, and any with a state.

A pass ends at the final hidden states; logits are made from slices of them, so that those of a
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
from ray_abliterate.evaluation.streaming import cache_state as caches
from ray_abliterate.evaluation.streaming.pass_size import slice_rows
from ray_abliterate.model.architecture import find_blocks
from ray_abliterate.model.engine.layer_skipping import begun_at, recorded


@runtime_checkable
class StatefulModel(Protocol):
    """A model that keeps its state itself, from call to call."""

    def __call__(self, input_ids: Tensor) -> Any:
        """Logits `"1 token vocab"`, or an object with such `logits`; the state moves on."""

    def get_state(self) -> Any:
        """The state; the caller copies it."""

    def set_state(self, state: Any) -> None:
        """Go on from a state."""

    def reset_state(self) -> None:
        """Go on from nothing."""


class Runner(Protocol):
    """One model, and the text that it has seen.

    Attributes:
        device: Where token ids go.
        vocab: Its ids are below.
        carried_bytes: Memory of what it keeps of the text.
        splits: A text may come in several passes.
    """

    device: torch.device
    vocab: int
    splits: bool

    @property
    def carried_bytes(self) -> int:
        """See above."""

    def begin(self, position: int = 0) -> None:
        """Forget the text; the next token is number `position`."""

    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One pass: losses of `targets`, which follow the last ids, float32 on the CPU."""

    def snapshot(self) -> Any:
        """For `restore`."""

    def restore(self, kept: Any) -> None:
        """Back to where the snapshot was taken; any number of times."""

    def export(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """What is kept of the text, for a file; None if it can't be written."""

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Go on from what was exported; whether that was possible."""


class ModuleRunner:
    """A causal language model of transformers."""

    def __init__(self, module: Any) -> None:
        embedding = module.get_input_embeddings().weight
        self.module, self.device, self.vocab = module, embedding.device, int(embedding.shape[0])
        self.window: int | None = None
        """Tokens that attention reaches back to; the model's own reach if None."""
        self.splits = True
        self.cache: Any = None
        self._body, self._name = _body(module)
        taken = set(inspect.signature(self._body.forward).parameters)
        names = [name for name in ("past_key_values", "cache_params") if name in taken]
        self.cache_name = names[0] if names else ""
        self._positions = "position_ids" in taken
        self._offset, self._fed = 0, 0
        self.start = 0
        """Block that passes begin at, from the next `begin` on."""
        self.states: Tensor | None = None
        """Input of that block in the next pass, `"token hidden"`."""
        self.record: tuple[int, ...] = ()
        """Blocks whose inputs are wanted."""
        self.inputs: dict[int, Tensor] = {}
        """Inputs of these in the last pass, `"1 token hidden"`."""
        self.in_tuples = False
        """Blocks answer with tuples."""
        self.rows = slice_rows(self.vocab, self.device)
        """Positions whose logits exist at a time."""
        self.head_slices = bool(self._name)
        """Logits can be made from slices of the hidden states."""

    @property
    def carried_bytes(self) -> int:
        """Memory of the cache."""
        return caches.cache_bytes(self.cache) if self.cache is not None else 0

    def begin(self, position: int = 0) -> None:
        """Forget the text; the next token is number `position`."""
        self._offset, self._fed, self.cache = position, 0, None
        if self.window is not None:
            from ray_abliterate.evaluation.streaming.sliding_window import bounded_cache

            self.cache = bounded_cache(self.module.config, self.window)
        if self.start and self.cache_name and self.splits:
            self.cache = caches.with_stand_in_layers(self._new_cache(), self.start)

    def _new_cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.module.config) if self.cache is None else self.cache

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks; none if they are not known."""
        try:
            return list(find_blocks(self.module)[1])
        except UnknownArchitecture:
            return []

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One pass: losses of `targets`, which follow the last ids, float32 on the CPU."""
        ids, count = ids.to(self.device), len(targets)
        if not self.head_slices and count:
            return self._losses_of(self._whole(ids)[len(ids) - count :], targets)
        hidden = self._pass(self._body, ids)[0][0]
        self._fed += len(ids)
        found = [torch.empty(0)]
        first = len(ids) - count
        for begin in range(0, count, self.rows):
            part = slice(first + begin, first + min(begin + self.rows, count))
            with self._given(hidden[None, part]):
                logits = self.module(input_ids=ids[None, part], use_cache=False).logits[0]
            found.append(self._losses_of(logits, targets[begin : begin + self.rows]))
        return torch.cat(found)

    @staticmethod
    def _losses_of(logits: Tensor, targets: Tensor) -> Tensor:
        wanted = targets.to(logits.device)
        return nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu()

    def _whole(self, ids: Tensor) -> Tensor:
        """Logits of a whole pass, `"token vocab"`."""
        output = self._pass(self.module, ids)
        self._fed += len(ids)
        logits: Tensor = output.logits[0]
        return logits

    def _pass(self, part: Any, ids: Tensor) -> Any:
        from ray_abliterate.evaluation.streaming.sliding_window import reaching

        options: dict[str, Any] = {"use_cache": bool(self.cache_name) and self.splits}
        if options["use_cache"]:
            options[self.cache_name] = self.cache
        if self._positions:  # not every model counts on from its cache
            seen = self._offset + self._fed
            options["position_ids"] = torch.arange(seen, seen + len(ids), device=self.device)[None]
        states, found = self.states, dict[int, Tensor]()
        if self.start:
            assert states is not None
            states = states.to(self.device)[None]
        with (
            reaching(self.window),
            begun_at(self.blocks, self.start, states, self.in_tuples),
            recorded(self.blocks, self.record, found),
        ):
            output = part(input_ids=ids[None], **options)
        if options["use_cache"]:
            self.cache = getattr(output, self.cache_name, None)
            if self.cache is None:
                raise EvaluationError(f"{type(self.module).__name__} returns no cache.")
        self.inputs = found
        return output

    @contextmanager
    def _given(self, hidden: Tensor) -> Iterator[None]:
        """The body of the model is one that has just computed `hidden`, in this block.

        What stands between hidden states and logits (a scale, a soft cap) is the model's own code.
        """
        setattr(self.module, self._name, _PrecomputedBody(hidden, self._body))
        try:
            yield
        finally:
            setattr(self.module, self._name, self._body)

    def snapshot(self) -> Any:
        """For `restore`."""
        return self._fed, caches.snapshot_cache(self.cache)

    def restore(self, kept: Any) -> None:
        """Back to where the snapshot was taken; any number of times."""
        self._fed, cache = kept
        self.cache = caches.restore_cache(self.cache, cache)

    def export(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """What is kept of the text, for a file; None if it can't be written."""
        found = (
            caches.export_cache(self.cache) if self.cache is not None and not self.start else None
        )
        if found is None:
            return None
        tensors, rest = found
        return tensors, [*rest, {"kind": "position", "offset": self._offset, "fed": self._fed}]

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Go on from what was exported; whether that was possible."""
        place = rest[-1]
        self.begin(place["offset"])
        cache = self._new_cache()
        if not caches.import_cache(cache, tensors, rest[:-1], self.device):
            self.begin()
            return False
        self.cache, self._fed = cache, place["fed"]
        return True


class StatefulRunner:
    """A model that keeps its state itself."""

    splits = True

    def __init__(self, model: StatefulModel, vocab: int) -> None:
        self._model, self.vocab = model, vocab
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        found = next(parameters, None)
        self.device = torch.device("cpu") if found is None else found.device

    @property
    def carried_bytes(self) -> int:
        """Memory of the state, as far as it is tensors."""
        return caches.cache_bytes(self._model.get_state())

    def begin(self, position: int = 0) -> None:
        """Forget the text."""
        self._model.reset_state()

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One pass: losses of `targets`, which follow the last ids, float32 on the CPU."""
        output = self._model(ids.to(self.device)[None])
        logits = output if isinstance(output, Tensor) else output.logits
        return ModuleRunner._losses_of(logits[0, len(ids) - len(targets) :], targets)

    def snapshot(self) -> Any:
        """A copy of the state."""
        return copy.deepcopy(self._model.get_state())

    def restore(self, kept: Any) -> None:
        """Back to where the snapshot was taken."""
        self._model.set_state(copy.deepcopy(kept))

    def export(self) -> None:
        """What a state is made of is the model's affair; it is computed again."""

    def load(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> bool:
        """Never."""
        return False


class _PrecomputedBody(nn.Module):
    """Stands where a model's body stands, and answers with what the body has computed."""

    def __init__(self, hidden: Tensor, body: Any) -> None:
        super().__init__()
        self._hidden = hidden
        self.__dict__["_stands_for"] = body  # not as a submodule

    def forward(self, *_args: Any, **_options: Any) -> "_Output":
        """The same, whatever is asked."""
        return _Output(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"], name)


class _Output:
    """An output with hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _body(module: Any) -> tuple[Any, str]:
    """What computes hidden states, and its name; the whole model where there is no such part."""
    name = getattr(module, "base_model_prefix", "")
    body = getattr(module, name, None) if name else None
    return (body, name) if isinstance(body, nn.Module) and body is not module else (module, "")
