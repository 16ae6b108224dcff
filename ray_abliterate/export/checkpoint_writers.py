"""A writer that is read from the checkpoint's files, one expert at a time, and edited there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.ablation import edit as ablation
from ray_abliterate.ablation.edit import Edit
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.stored_parameters import Form, StoredForms
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
        parameter_shape: As the model has it.
        forms: Copies of its weight in the files.
        bias_forms: Copies of its bias.
    """

    writer: Writer
    gain: Tensor | None
    device: torch.device
    parameter_shape: tuple[int, ...]
    forms: tuple[Form, ...]
    bias_forms: tuple[Form, ...]
    stored: StoredForms
    source: Checkpoint

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Experts, hidden, fan-in."""
        experts, *both = self.parameter_shape if not self.dense else (1, *self.parameter_shape)
        hidden, fan_in = both if self.writer.hidden_axis + self.dense == 1 else reversed(both)
        return experts, hidden, fan_in

    @property
    def dense(self) -> bool:
        """Whether it is one matrix, not a stack of experts."""
        return len(self.parameter_shape) == 2

    def project(self, rows: Tensor, norm: Norm) -> ablation.Projections:
        """Products of the stored weights with vectors; in memory is one float32 matrix, or two."""
        experts = range(self.shape[0])
        parts = [ablation.project(self.matrix(expert), rows, norm) for expert in experts]
        return ablation.joined(parts)

    def matrix(self, expert: int) -> Tensor:
        """One expert of the first copy in float32, `"1 hidden fan_in"`."""
        parameter = self.as_loaded(self.forms[0], self.raw(self.forms[0], expert))
        return self.turned(parameter.contiguous()).to(self.device, torch.float32)

    def raw(self, form: Form, expert: int) -> Tensor:
        """One expert as it is stored; all of a dense matrix."""
        if form.kind == "experts":
            return self.source.read(form.tensors[expert])
        return self.source.read(form.tensors[0], None if self.dense else expert)

    def as_loaded(self, form: Form, raw: Tensor) -> Tensor:
        """A view of it as the model has it."""
        return raw.transpose(0, 1) if form.kind == "transposed" else raw

    def turned(self, parameter: Tensor) -> Tensor:
        """A view of one expert with the residual stream at axis 1, `"1 hidden fan_in"`."""
        return oriented(parameter if self.dense else parameter.unsqueeze(0), self.writer)

    # Edited

    @torch.no_grad()
    def edited(self, form: Form, expert: int, edit: Edit) -> Tensor:
        """One expert as it is stored, after the edit: float32, one rounding at the end."""
        raw = self.raw(form, expert)
        view = self.turned(self.as_loaded(form, raw))
        if self.device.type == "cpu":
            of_expert(edit, expert).apply_(view, view)
            return raw
        there = view.to(self.device)
        of_expert(edit, expert).apply_(there, there)
        view.copy_(there)
        return raw

    @torch.no_grad()
    def edited_biases(self, edit: Edit) -> Iterator[tuple[str, Tensor]]:
        """All copies of the bias after the edit, by stored name."""
        for form in self.bias_forms:
            value = self.stored.load(form)
            there = value.to(self.device)
            edit.apply_to_bias_(there, there)
            yield from self.stored.cut(form, there.to(value.device)).items()


def of_expert(edit: Edit, expert: int) -> Edit:
    """The edit of one expert of a stack."""
    one = slice(expert, expert + 1)
    s = None if edit.s is None else edit.s[one]
    c = None if edit.c is None else edit.c[one]
    return replace(edit, a=edit.a[one], b=edit.b[one], s=s, c=c)


def stored_writers(
    module: Any, source: Checkpoint, rows: tuple[WriterRow, ...], device: torch.device
) -> list[StoredWriter]:
    """The writers of a skeleton, where the checkpoint holds them.

    Reads the norms after them, which are small, and nothing else.

    Raises:
        ExportError: the checkpoint does not hold a writer as the model has it.
    """
    stored = StoredForms(module, source)
    writers = find_writers(module, rows, in_memory=False)
    for name in sorted({n for w in writers for n in (w.post_norm, w.outer_norm) if n}):
        for key in dict(module.get_submodule(name).named_parameters()):
            value = stored.load(stored.of(f"{name}.{key}")[0])
            set_tensor(module, f"{name}.{key}", value.to(device))
    return [
        StoredWriter(
            writer,
            post_norm_gain(module, writer, device),
            device,
            tuple(module.get_parameter(writer.parameter).shape),
            stored.of(writer.parameter),
            stored.of(writer.bias) if writer.bias else (),
            stored,
            source,
        )
        for writer in writers
    ]
