"""Writers that are read from the checkpoint's files, one expert at a time, and edited."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.ablation.edit import (
    Edit,
    Projections,
    compute_projections,
    join_projections,
)
from ray_abliterate.export.checkpoint import DTYPES, Checkpoint
from ray_abliterate.export.stored_parameters import StoredForm, StoredParameters
from ray_abliterate.model.architecture import (
    Writer,
    WriterRow,
    find_writers,
    oriented,
    post_norm_gain,
)
from ray_abliterate.model.skeleton import set_tensor
from ray_abliterate.recipe import Norm


@dataclass(frozen=True)
class StoredWriter:
    """One writer in the files.

    Attributes:
        writer: Its place in the model.
        gain: Effective weight of the norms after it, `"hidden"`.
        device: Where products are computed: the kind of device that the search used.
        parameter_shape: The shape that the model gives its weight.
        forms: The copies of its weight in the files.
        bias_forms: The copies of its bias.
        stored: All parameters of the checkpoint.
        source: The checkpoint.
    """

    writer: Writer
    gain: Tensor | None
    device: torch.device
    parameter_shape: tuple[int, ...]
    forms: tuple[StoredForm, ...]
    bias_forms: tuple[StoredForm, ...]
    stored: StoredParameters
    source: Checkpoint

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The writer's size as (experts, hidden, fan_in), whatever its axes in the model."""
        experts, *axes = self.parameter_shape if not self.dense else (1, *self.parameter_shape)
        hidden, fan_in = axes if self.writer.hidden_axis + self.dense == 1 else reversed(axes)
        return experts, hidden, fan_in

    @property
    def dense(self) -> bool:
        """Whether the writer is one matrix, rather than a stack of experts."""
        return len(self.parameter_shape) == 2

    def project(self, rows: Tensor, norm: Norm) -> Projections:
        """Return the products of the stored weights with vectors, `"row hidden"`.

        In memory are one or two float32 matrices at a time.
        """
        experts = range(self.shape[0])
        parts = [compute_projections(self.matrix(expert), rows, norm) for expert in experts]
        return join_projections(parts)

    def matrix(self, expert: int) -> Tensor:
        """Read one expert of the first copy in float32, `"1 hidden fan_in"`."""
        parameter = self._as_loaded(self.forms[0], self._read_expert(self.forms[0], expert))
        return self._oriented(parameter.contiguous()).to(self.device, torch.float32)

    def _read_expert(self, form: StoredForm, expert: int) -> Tensor:
        """Read one expert as it is stored; of a dense matrix, all of it."""
        if form.kind == "experts":
            return self.source.read(form.tensors[expert])
        return self.source.read(form.tensors[0], None if self.dense else expert)

    def _as_loaded(self, form: StoredForm, stored: Tensor) -> Tensor:
        """View a stored expert with the axes that the model gives it."""
        return stored.transpose(0, 1) if form.kind == "transposed" else stored

    def _oriented(self, parameter: Tensor) -> Tensor:
        """View one expert with the residual stream at axis 1, `"1 hidden fan_in"`."""
        return oriented(parameter if self.dense else parameter.unsqueeze(0), self.writer)

    # Edited

    @torch.no_grad()
    def edited_expert(self, form: StoredForm, expert: int, edit: Edit) -> Tensor:
        """Return one expert after the edit, as it is stored.

        Computed in float32 and rounded once, to the stored dtype.
        """
        stored = self._read_expert(form, expert)
        view = self._oriented(self._as_loaded(form, stored))  # shares the memory of `stored`
        if self.device.type == "cpu":
            edit_of_expert(edit, expert).apply_(view, view)
            return stored
        on_device = view.to(self.device)
        edit_of_expert(edit, expert).apply_(on_device, on_device)
        view.copy_(on_device)
        return stored

    @torch.no_grad()
    def edited_biases(self, edit: Edit) -> Iterator[tuple[str, Tensor]]:
        """Yield all copies of the bias after the edit, each with its name in the files."""
        for form in self.bias_forms:
            value = self.stored.load(form)
            on_device = value.to(self.device)
            edit.apply_to_bias_(on_device, on_device)
            yield from self.stored.as_stored(form, on_device.to(value.device)).items()


@dataclass(frozen=True)
class StoredModel:
    """A model whose weights stay in the checkpoint's files.

    Attributes:
        source: The checkpoint.
        module: The skeleton: the model without its weights.
        writers: Its writers, in the model's order.
    """

    source: Checkpoint
    module: nn.Module
    writers: list[StoredWriter]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the writers are stored in, to which edited weights are rounded."""
        return DTYPES[self.source.tensors[self.writers[0].forms[0].tensors[0]].dtype]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with a number of CPU threads: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def edit_of_expert(edit: Edit, expert: int) -> Edit:
    """Return the edit of one expert of a stack, as a stack of one."""
    one = slice(expert, expert + 1)
    s = None if edit.s is None else edit.s[one]
    c = None if edit.c is None else edit.c[one]
    return replace(edit, a=edit.a[one], b=edit.b[one], s=s, c=c)


def stored_writers(
    module: Any, source: Checkpoint, rows: tuple[WriterRow, ...], device: torch.device
) -> list[StoredWriter]:
    """Return the writers of a skeleton, each with its place in the checkpoint.

    Reads the weights of the norms after the writers, which are small, and no others.

    Raises:
        ExportError: the checkpoint does not hold a writer as the model has it.
    """
    stored = StoredParameters(module, source)
    writers = find_writers(module, rows, in_memory=False)
    for name in sorted({n for w in writers for n in (w.post_norm, w.outer_norm) if n}):
        for key in dict(module.get_submodule(name).named_parameters()):
            value = stored.load(stored.forms_of(f"{name}.{key}")[0])
            set_tensor(module, f"{name}.{key}", value.to(device))
    return [
        StoredWriter(
            writer,
            post_norm_gain(module, writer, device),
            device,
            tuple(module.get_parameter(writer.parameter).shape),
            stored.forms_of(writer.parameter),
            stored.forms_of(writer.bias) if writer.bias else (),
            stored,
            source,
        )
        for writer in writers
    ]
