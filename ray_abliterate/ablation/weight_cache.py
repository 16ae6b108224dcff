"""The layer-wise weight cache: pristine copies of writers only, and edits undone bit for bit.

    with cache.edited(plan, directions):
        ...                      # the model is the plan's
    # every writer has its own bits again, also if the body raised

Weights are written in place (same storage), so tied tensors, hooks and views stay valid. Those that
can't be, because their numbers are quantized or not in memory, are edited beside
(`ablation/layer_hooks.py`).
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ray_abliterate.ablation import edit as ablation
from ray_abliterate.ablation.layer_hooks import Choice, EditedLayer
from ray_abliterate.ablation.live_writers import ClosedWriter, OpenWriter, can_be_written
from ray_abliterate.ablation.planned_edits import Edits
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer, post_norm_gain
from ray_abliterate.recipe import Norm
from ray_abliterate.search.plan import Plan

log = logging.getLogger(__name__)


@runtime_checkable
class SharedStore(Protocol):
    """Arrays that the processes of one machine share."""

    def share(self, key: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The arrays under a key, read-only; made now if they are not there."""


class WeightCache:
    """Pristine writer weights of one model, by layer."""

    def __init__(
        self,
        model: nn.Module,
        writers: tuple[Writer, ...],
        location: Literal["node", "device", "cpu"] = "device",
        store: SharedStore | None = None,
    ) -> None:
        """Copy every writer that can be written to.

        Args:
            model: The model, untouched.
            writers: As `architecture.find_writers` gives them.
            location: `device` keeps copies beside the weights (restores at memory speed), `cpu` in
                CPU memory, pinned where there is a GPU, `node` in the store.
            store: Holds what the replicas of one node share; without one, `node` is `cpu`.

        Raises:
            ModelError: the node's replicas hold other weights, or experts can't be written to.
        """
        closed = {writer.parameter for writer in writers if not can_be_written(model, writer)}
        written = [writer for writer in writers if writer.parameter not in closed]
        shared = _shared(model, written, store) if location == "node" and store else {}
        self._targets = [
            ClosedWriter(model, writer)
            if writer.parameter in closed
            else _open(model, writer, location, shared)
            for writer in writers
        ]
        self._edits = Edits(self._targets, always=closed)
        self._dirty: set[int] = set()
        self._open: tuple[Plan, Directions] | None = None
        self.on_write: Callable[[str], None] | None = None
        """Is told each parameter that was written to."""

    @property
    def bytes(self) -> int:
        """Memory of the pristine copies."""
        open_ = [target for target in self._targets if isinstance(target, OpenWriter)]
        tensors = [t for x in open_ for t in (x.pristine, x.pristine_bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def closed(self) -> bool:
        """Whether some writers can't be written to, and are edited beside."""
        return any(isinstance(target, ClosedWriter) for target in self._targets)

    def multiply(self, directions: Directions, norm: Norm) -> None:
        """Multiply what can't be written to with the directions, so that no trial needs to."""
        for target in self._targets:
            if isinstance(target, ClosedWriter):
                self._edits.multiply(target, directions, norm)

    def beside(self, choice: Choice) -> dict[str, EditedLayer]:
        """Every writer as a layer that can be edited beside its weights, by parameter.

        Raises:
            ModelError: a writer is not the weight of a linear layer (stacked experts).
        """
        return {target.writer.parameter: target.beside(choice) for target in self._targets}

    @property
    def experts(self) -> str:
        """A writer that stacks experts; empty if none does."""
        stacks = [x.writer.parameter for x in self._targets if x.stacks_experts]
        return stacks[0] if stacks else ""

    def restore(self, layer: int | None = None) -> None:
        """Put the pristine bits back into one layer, or into all that were written to."""
        layers = self._dirty if layer is None else {layer}
        for target in self._targets:
            if target.writer.layer in layers:
                target.restore()
                self._written(target)
        self._dirty -= set(layers)

    @contextmanager
    def edited(self, plan: Plan, directions: Directions) -> Iterator[None]:
        """The model is the plan's inside the block, and its own again after it.

        Raises:
            ModelError: an edit is open already (edits don't nest), or the directions are of
                another model.
        """
        if self._open is not None:
            raise ModelError("an edit is already open on this model; edits don't nest")
        self._open = plan, directions
        try:
            with record_function("edit"):
                self._apply(plan, directions)
            yield
        finally:
            with record_function("restore"):
                self.restore()
            self._open = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model is the base model inside the block, and the open edit's again after it.

        Costs a restore and an edit: every edited matrix is written twice. Without an open edit
        nothing happens.
        """
        held = self._open
        if held is None:
            yield
            return
        self._open = None
        self.restore()
        try:
            yield
        finally:
            self._open = held
            self._apply(*held)

    @property
    def untouched(self) -> int:
        """Blocks, from the first, whose writers all are pristine now."""
        return min(self._dirty, default=self.layers)

    def differs(self) -> bool:
        """Whether any writer's bits differ from the pristine ones now.

        Beside a layer, an edit counts whose strength is above the rounding of its output.
        """
        edited = [target for target in self._targets if target.writer.layer in self._dirty]
        return any(target.differs() for target in edited)

    @property
    def layers(self) -> int:
        """Blocks up to and with the last that has a writer."""
        return 1 + max(target.writer.layer for target in self._targets)

    @property
    def writers(self) -> tuple[Writer, ...]:
        """The writers, in order."""
        return tuple(target.writer for target in self._targets)

    def edits(self, plan: Plan, directions: Directions) -> Iterator[tuple[Writer, ablation.Edit]]:
        """What a plan does to each writer that it does not leave alone."""
        for target, edit in self._edits.of(plan, directions):
            yield target.writer, edit

    def _apply(self, plan: Plan, directions: Directions) -> None:
        for target, edit in self._edits.of(plan, directions):
            self._dirty.add(target.writer.layer)
            target.apply(edit)
            self._written(target)

    def _written(self, target: OpenWriter | ClosedWriter) -> None:
        if self.on_write is not None and isinstance(target, OpenWriter):
            self.on_write(target.writer.parameter)


def _open(
    model: nn.Module, writer: Writer, location: str, shared: Mapping[str, Tensor]
) -> OpenWriter:
    def pristine(name: str) -> Tensor:
        found = shared.get(name)
        return _copy(model.get_parameter(name), location) if found is None else found

    bias = model.get_parameter(writer.bias).data if writer.bias else None
    return OpenWriter(
        writer,
        model.get_submodule(writer.parameter.rpartition(".")[0]),
        model.get_parameter(writer.parameter).data,
        pristine(writer.parameter),
        bias,
        pristine(writer.bias) if writer.bias else None,
        post_norm_gain(model, writer),
    )


def _shared(model: nn.Module, writers: Sequence[Writer], store: SharedStore) -> dict[str, Tensor]:
    """Pristine tensors of the whole node, layer by layer; read-only, whoever maps them."""
    found: dict[str, Tensor] = {}
    for layer in sorted({writer.layer for writer in writers}):
        own = [writer for writer in writers if writer.layer == layer]
        names = [name for w in own for name in (w.parameter, w.bias) if name]
        live = {name: model.get_parameter(name).detach().cpu().contiguous() for name in names}
        held = store.share(f"layer {layer}", partial(_all_bits, live))
        for name, tensor in live.items():
            bits = held.get(name)
            if bits is None or not numpy.array_equal(_bits(tensor), bits):
                raise ModelError(
                    f"{name} is not what this node's other replicas loaded.\n"
                    "  The model's files changed in between; start again."
                )
            found[name] = _read_only(bits).view(tensor.dtype).reshape(tensor.shape)
    return found


def _all_bits(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _bits(tensor) for name, tensor in tensors.items()}


def _bits(tensor: Tensor) -> Any:
    """The tensor's bits as unsigned integers: numpy knows no bfloat16, and NaN equals itself."""
    unsigned = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32}[tensor.element_size()]
    return tensor.flatten().view(torch.uint8).numpy().view(unsigned)


def _read_only(array: Any) -> Tensor:
    """A tensor that maps an array. It must never be written to: others map it too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.view(numpy.uint8))


def _copy(tensor: Any, location: str) -> Tensor:
    copy: Tensor = tensor.detach().clone()
    if location == "device" or copy.device.type == "cpu":
        return copy
    copy = copy.cpu()
    return copy.pin_memory() if torch.cuda.is_available() else copy
