"""Which tensors of a checkpoint hold a parameter, determined from names and shapes alone.

transformers renames tensors and stacks experts as it loads. Its own rules say what becomes of each
stored tensor; no weight is read to find out.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint import Checkpoint

StorageKind = Literal["whole", "experts", "transposed"]


@dataclass(frozen=True)
class StoredForm:
    """One copy of a parameter in the checkpoint.

    Attributes:
        parameter: The name that transformers loads it under; a shared parameter has several.
        kind: `whole`: one tensor is the parameter. `experts`: each tensor is one slice of it along
            the first axis. `transposed`: one tensor is a stack of experts, each transposed.
        tensors: The tensors' names in the checkpoint, experts in order.
    """

    parameter: str
    kind: StorageKind
    tensors: tuple[str, ...]


class StoredParameters:
    """The parameters of a skeleton, by the names and shapes that a checkpoint stores them in."""

    def __init__(self, module: Any, source: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self._module = module
        self._source = source
        rules = get_model_conversion_mapping(module)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._converters = {p: rule for rule in converters for p in rule.source_patterns}
        self._parameters = module.state_dict(keep_vars=True)
        self._sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for name in sorted(source.tensors, key=dot_natural_key):
            loaded, pattern = self._loaded_as(name, rules)
            self._sources[loaded].append((name, pattern))
        self._patterns = {name: p for group in self._sources.values() for name, p in group}

    def _loaded_as(self, name: str, rules: list[Any]) -> tuple[str, str | None]:
        """Return the parameter that transformers loads a stored tensor into, and the matching rule.

        The rule is given by its pattern; it is None where the tensor is only renamed.
        """
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix, known = self._module.base_model_prefix, self._parameters
        loaded, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if loaded not in known and name in known:
            loaded, pattern = rename_source_key(name, [], [], prefix, known)
        return loaded, pattern

    def forms_of(self, parameter: str) -> tuple[StoredForm, ...]:
        """Return the copies of a parameter: several if layers share it and the files don't.

        Raises:
            ExportError: the checkpoint lacks it, or holds it in another shape or type.
        """
        tensor = self._module.get_parameter(parameter)
        names = [name for name, value in self._parameters.items() if value is tensor]
        names.sort(key=lambda name: name != parameter)
        forms = tuple(form for name in names if (form := self._form(name, tensor)) is not None)
        if not forms:
            raise ExportError(
                f"{self._source.folder} holds no tensor {parameter}, so its edit cannot be put "
                "back.\n  If the checkpoint is quantized, search and export an unquantized copy "
                "of the model."
            )
        for name in (name for form in forms for name in form.tensors):
            self._source.refuse_unreadable(name)
        return forms

    def _form(self, parameter: str, tensor: Tensor) -> StoredForm | None:
        group = self._sources.get(parameter)
        if group is None:
            return None
        names = tuple(name for name, _ in group)
        kind = self._kind({pattern for _, pattern in group}, tensor)
        if kind is None:
            raise ExportError(
                f"{parameter} is computed from {names[0]} in a way that cannot be undone tensor by "
                "tensor, so its edit cannot be put back.\n  Save the model again with "
                "save_original_format=False, and run the recipe on that folder."
            )
        shape, held = tuple(tensor.shape), self._source.tensors[names[-1]].shape
        if kind == "experts":
            fits = all((len(names), *self._source.tensors[n].shape) == shape for n in names)
        else:
            transposed = kind == "transposed" and (
                held != shape or self._always_transposes(names[-1])
            )
            fits = ((held[0], held[2], held[1]) if transposed else held) == shape
            kind = "transposed" if transposed else "whole"
        if not fits:
            raise ExportError(
                f"{names[0]} in {self._source.folder} does not have the shape of {parameter}, "
                f"{shape}.\n  Save the model again with save_pretrained, and run the recipe on "
                "that folder."
            )
        return StoredForm(parameter, kind, names if kind == "experts" else names[-1:])

    def _kind(self, patterns: set[str | None], tensor: Tensor) -> StorageKind | None:
        """Return what the rules that match a parameter's tensors do; None if no kind covers it."""
        from transformers.core_model_loading import MergeModulelist, Transpose

        if patterns == {None}:
            return "whole"
        rule = self._converters[next(iter(patterns)) or ""] if len(patterns) == 1 else None
        if rule is None or len(rule.operations) != 1 or len(rule.target_patterns) != 1:
            return None
        operation = rule.operations[0]
        if type(operation) is MergeModulelist and operation.dim == 0:
            return "experts"
        axes = {operation.dim0, operation.dim1} if type(operation) is Transpose else set()
        return "transposed" if axes == {1, 2} and tensor.ndim == 3 else None

    def _always_transposes(self, name: str) -> bool:
        """Return whether the rule for a tensor transposes it even if it has the right shape."""
        rule = self._converters[self._patterns[name] or ""]
        return not rule.operations[0].check_dims

    # Values

    def load(self, form: StoredForm) -> Tensor:
        """Read all of a parameter as the model has it, in the stored dtype."""
        if form.kind == "experts":
            return torch.stack([self._source.read(name) for name in form.tensors])
        whole = self._source.read(form.tensors[0])
        return whole.transpose(1, 2) if form.kind == "transposed" else whole

    def as_stored(self, form: StoredForm, value: Tensor) -> Mapping[str, Tensor]:
        """Return new values of a parameter as the checkpoint names and divides them."""
        if form.kind == "experts":
            return dict(zip(form.tensors, value, strict=True))
        transposed = form.kind == "transposed"
        return {form.tensors[0]: value.transpose(1, 2).contiguous() if transposed else value}
