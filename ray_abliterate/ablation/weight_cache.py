"""The layer-wise weight cache: pristine copies of writers only, and edits undone bit for bit.

    with cache.edited(plan, directions):
        ...                      # the model is the plan's
    # every writer has its own bits again, also if the body raised

Weights are written in place (same storage), so tied tensors, hooks and views stay valid. Writers
whose numbers are quantized or offloaded are edited by hooks (`ablation/layer_hooks.py`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.ablation.layer_hooks import EditSelector, LayerHook
from ray_abliterate.ablation.live_writers import HookedWriter, InPlaceWriter, is_writable
from ray_abliterate.ablation.planned_edits import PlannedEdits
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer, post_norm_gain
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import Norm
from ray_abliterate.search.plan import Plan


@runtime_checkable
class SharedStore(Protocol):
    """Arrays that the processes of one machine share."""

    def share(self, key: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the read-only arrays under a key, made by `make` if there are none yet."""


class WeightCache:
    """The pristine writer weights of one model, by layer.

    Attributes:
        on_write: Is called with each parameter that was written to.
        on_hook_change: Is called after a hook's edits were set or cleared.
    """

    def __init__(
        self,
        model: nn.Module,
        writers: tuple[Writer, ...],
        location: Literal["node", "device", "cpu"] = "device",
        store: SharedStore | None = None,
    ) -> None:
        """Copy every writer that can be written to, and hook the others.

        Args:
            model: The transformers model, not yet edited.
            writers: Its writers, from `architecture.find_writers`.
            location: `device` holds the copies on the weights' device (restores at memory speed),
                `cpu` in CPU memory, pinned where there is a GPU, `node` in the store.
            store: Holds what the replicas of one node share; without one, `node` means `cpu`.

        Raises:
            ModelError: the node's replicas hold other weights, or stacked experts can't be written
                to.
        """
        self.on_write: Callable[[str], None] | None = None
        self.on_hook_change: Callable[[], None] | None = None
        hooked = {writer.parameter for writer in writers if not is_writable(model, writer)}
        in_place = [writer for writer in writers if writer.parameter not in hooked]
        shared = _share_pristine(model, in_place, store) if location == "node" and store else {}
        self._targets = [
            HookedWriter(model, writer, self._hook_changed)
            if writer.parameter in hooked
            else _copy_writer(model, writer, location, shared)
            for writer in writers
        ]
        self._edits = PlannedEdits(self._targets, always=hooked)
        self._edited_layers: set[int] = set()
        self._applied: tuple[Plan, Directions] | None = None

    def attach(self, model: LanguageModel) -> None:
        """Keep a language model in step with the edits of its weights.

        It can suspend them (`unedited`), refreshes its float32 copies of what is written, and
        records CUDA graphs anew after a hook changed, since a graph holds the old edit's tensors.

        Args:
            model: The model around the module that this cache is of.
        """
        if model.float32_linears is not None:
            self.on_write = model.float32_linears.refresh
        self.on_hook_change = model.invalidate_graphs
        model.unedited = self.suspended

    @property
    def bytes(self) -> int:
        """The bytes of the pristine copies."""
        in_place = [target for target in self._targets if isinstance(target, InPlaceWriter)]
        tensors = [t for x in in_place for t in (x.pristine, x.pristine_bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def has_hooked_writers(self) -> bool:
        """Whether some writers can't be written to, and are edited by hooks."""
        return any(isinstance(target, HookedWriter) for target in self._targets)

    @property
    def stacked_experts(self) -> str:
        """The name of a writer that stacks experts; empty if none does."""
        stacks = [target.writer.parameter for target in self._targets if target.stacks_experts]
        return stacks[0] if stacks else ""

    @property
    def layers(self) -> int:
        """The number of blocks up to and with the last that has a writer."""
        return 1 + max(target.writer.layer for target in self._targets)

    @property
    def writers(self) -> tuple[Writer, ...]:
        """All writers, in the model's order."""
        return tuple(target.writer for target in self._targets)

    @property
    def untouched(self) -> int:
        """The number of blocks, from the first, whose writers are all pristine now."""
        return min(self._edited_layers, default=self.layers)

    def precompute_projections(self, directions: Directions, norm: Norm) -> None:
        """Compute the projections of hooked writers, so that no trial has to read their layers."""
        for target in self._targets:
            if isinstance(target, HookedWriter):
                self._edits.precompute_projections(target, directions, norm)

    def add_hooks(self, selector: EditSelector) -> dict[str, LayerHook]:
        """Add a hook to every writer's layer, and return the hooks by parameter.

        Raises:
            ModelError: a writer is not the weight of a linear layer (stacked experts).
        """
        return {
            target.writer.parameter: target.add_hook(selector, self._hook_changed)
            for target in self._targets
        }

    def edits(self, plan: Plan, directions: Directions) -> Iterator[tuple[Writer, Edit]]:
        """Yield each writer that a plan edits, with its edit; nothing is applied."""
        for target, edit in self._edits.edits_of(plan, directions):
            yield target.writer, edit

    @contextmanager
    def edited(self, plan: Plan, directions: Directions) -> Iterator[None]:
        """Let the model be the plan's inside the block, and its own again after it.

        Raises:
            ModelError: an edit is applied already (edits don't nest), or the directions are of
                another model.
        """
        if self._applied is not None:
            raise ModelError("an edit is applied already to this model; edits don't nest")
        self._applied = plan, directions
        try:
            with record_function("edit"):
                self._apply(plan, directions)
            yield
        finally:
            with record_function("restore"):
                self.restore()
            self._applied = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model be the base model inside the block, and the edited one again after it.

        Costs a restore and an edit: every edited matrix is written twice. Without an applied edit
        nothing happens.
        """
        applied = self._applied
        if applied is None:
            yield
            return
        self._applied = None
        self.restore()
        try:
            yield
        finally:
            self._applied = applied
            self._apply(*applied)

    def restore(self, layer: int | None = None) -> None:
        """Write the pristine bits back into one layer, or into all that are edited."""
        layers = self._edited_layers if layer is None else {layer}
        for target in self._targets:
            if target.writer.layer in layers:
                target.restore()
                self._written(target)
        self._edited_layers -= set(layers)

    def differs(self) -> bool:
        """Return whether any writer's bits differ from the pristine ones now.

        The edit of a hooked writer counts if its strength is above the rounding of the output.
        """
        edited = [target for target in self._targets if target.writer.layer in self._edited_layers]
        return any(target.differs() for target in edited)

    def _apply(self, plan: Plan, directions: Directions) -> None:
        for target, edit in self._edits.edits_of(plan, directions):
            self._edited_layers.add(target.writer.layer)  # first, so that a failed edit is undone
            target.apply(edit)
            self._written(target)

    def _written(self, target: InPlaceWriter | HookedWriter) -> None:
        if self.on_write is not None and isinstance(target, InPlaceWriter):
            self.on_write(target.writer.parameter)

    def _hook_changed(self) -> None:
        if self.on_hook_change is not None:
            self.on_hook_change()


def _copy_writer(
    model: nn.Module, writer: Writer, location: str, shared: Mapping[str, Tensor]
) -> InPlaceWriter:
    """Return a writer with pristine copies: the node's shared ones, or its own."""

    def pristine(name: str) -> Tensor:
        tensor = shared.get(name)
        return _copy(model.get_parameter(name), location) if tensor is None else tensor

    return InPlaceWriter(
        writer,
        model.get_submodule(writer.parameter.rpartition(".")[0]),
        model.get_parameter(writer.parameter).data,
        pristine(writer.parameter),
        model.get_parameter(writer.bias).data if writer.bias else None,
        pristine(writer.bias) if writer.bias else None,
        post_norm_gain(model, writer),
    )


def _share_pristine(
    model: nn.Module, writers: Sequence[Writer], store: SharedStore
) -> dict[str, Tensor]:
    """Return the node's pristine tensors, read-only for all that map them; layer by layer.

    Raises:
        ModelError: another replica of the node loaded other weights.
    """
    shared: dict[str, Tensor] = {}
    for layer in sorted({writer.layer for writer in writers}):
        of_layer = [writer for writer in writers if writer.layer == layer]
        names = [name for w in of_layer for name in (w.parameter, w.bias) if name]
        live = {name: model.get_parameter(name).detach().cpu().contiguous() for name in names}
        stored = store.share(f"layer {layer}", partial(_all_bits, live))
        for name, tensor in live.items():
            bits = stored.get(name)
            if bits is None or not numpy.array_equal(_bits(tensor), bits):
                raise ModelError(
                    f"{name} is not what this node's other replicas loaded.\n"
                    "  The model's files changed in between; start again."
                )
            shared[name] = _read_only(bits).view(tensor.dtype).reshape(tensor.shape)
    return shared


def _all_bits(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _bits(tensor) for name, tensor in tensors.items()}


def _bits(tensor: Tensor) -> Any:
    """Return a tensor's bits as unsigned integers: numpy has no bfloat16, and NaN equals itself."""
    unsigned = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32}[tensor.element_size()]
    return tensor.flatten().view(torch.uint8).numpy().view(unsigned)


def _read_only(array: Any) -> Tensor:
    """Return a tensor that maps an array. It must never be written to: others map it too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.view(numpy.uint8))


def _copy(tensor: Any, location: str) -> Tensor:
    copy: Tensor = tensor.detach().clone()
    if location == "device" or copy.device.type == "cpu":
        return copy
    copy = copy.cpu()
    return copy.pin_memory() if torch.cuda.is_available() else copy
