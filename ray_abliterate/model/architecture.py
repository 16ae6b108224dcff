"""Finds the writers of a model: the parameters that write to the residual stream.

Reads the table in `families`. Knows nothing about directions, edits or how a model is loaded, and
does not import transformers: it looks at a model's names, shapes and configuration.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.errors import ModelError, UnknownArchitecture
from ray_abliterate.model.families import (
    FAMILIES,
    UNSUPPORTED,
    Family,
    WriterRow,
    families_markdown,
)
from ray_abliterate.recipe import COMPONENT_NAMES

__all__ = [
    "FAMILIES",
    "Family",
    "Writer",
    "WriterRow",
    "families_markdown",
    "find_blocks",
    "find_writers",
    "hidden_size",
    "oriented",
    "post_norm_gain",
    "refuse_meta",
    "text_config",
]

_NEXT_STEP = (
    "  Add a row to ray_abliterate/model/families.py, or set [model] writers in the recipe; "
    "see docs/architectures.md."
)


@dataclass(frozen=True)
class Writer:
    """A parameter that writes to the residual stream.

    Attributes:
        layer: Index of the block, from 0.
        component: One of `COMPONENT_NAMES`.
        parameter: Dotted name in the model, e.g. `model.layers.3.self_attn.o_proj.weight`.
        hidden_axis: The axis of the parameter in residual units.
        bias: Dotted name of its bias, `"hidden"` or `"expert hidden"`, if it has one.
        post_norm: Dotted name of a norm module between the writer and the stream, if any.
        outer_norm: Dotted name of a second norm, after `post_norm`, if any.
    """

    layer: int
    component: str
    parameter: str
    hidden_axis: int
    bias: str | None
    post_norm: str | None
    outer_norm: str | None = None


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language tower."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    return int(text_config(model).hidden_size)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the residual blocks of the language tower.

    That is the one list of `num_hidden_layers` modules that belongs to a module with the language
    tower's configuration, so that vision and audio towers are never taken, whatever their names.

    Raises:
        UnknownArchitecture: there is no such list, or more than one.
    """
    config = text_config(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and _model_type(model.get_submodule(name.rpartition(".")[0])) == config.model_type
    }
    if len(lists) != 1:
        names = ", ".join(lists) or "none"
        raise UnknownArchitecture(
            f"the residual blocks of {_description(model)} were not found.\n"
            f"  Expected one list of {config.num_hidden_layers} modules; found: {names}.\n"
            "  See docs/architectures.md."
        )
    return next(iter(lists.items()))


def find_writers(
    model: nn.Module, rows: Sequence[WriterRow] = (), in_memory: bool = True
) -> tuple[Writer, ...]:
    """Return the writers of `model`, in order of layer, then component, then name.

    A parameter that several layers share appears once, in the first of them.

    Args:
        model: A transformers model.
        rows: Rows from the recipe, in addition to those of the model's family. They also stand in
            for a family that has none.
        in_memory: Refuse weights on the meta device. False for a skeleton, and for a model that is
            quantized or offloaded.

    Raises:
        UnknownArchitecture: the model's type has no rows, or a layer has no writer.
        ModelError: two rows claim one parameter, a row from the recipe matches none, the hidden
            axis has another width than the stream, or a parameter has no storage.
    """
    _check_rows(rows)
    all_rows = (*_rows_of(model, refuse=not rows), *rows)
    prefix, blocks = find_blocks(model)
    if not all_rows:
        opening = f"no writers are declared for {_description(model)}."
        raise UnknownArchitecture(_undeclared(opening, model, dict(enumerate(blocks))))
    writers: list[Writer] = []
    seen: set[int] = set()
    used: set[WriterRow] = set()
    for layer, block in enumerate(blocks):
        parameters = dict(block.named_parameters(remove_duplicate=False))
        claims = [(name, row) for name in parameters if (row := _claim(name, all_rows))]
        if not claims:
            opening = f"no writer is declared for layer {layer} of {_description(model)}."
            raise UnknownArchitecture(_undeclared(opening, model, {layer: block}))
        used.update(row for _, row in claims)
        for name, row in claims:
            if id(parameters[name]) in seen:
                continue
            seen.add(id(parameters[name]))
            full_name = f"{prefix}.{layer}.{name}"
            if in_memory:
                refuse_meta(full_name, parameters[name])
            _check_parameter(full_name, parameters[name], row, hidden_size(model))
            writers.append(_writer(f"{prefix}.{layer}", layer, block, name, row))
    for row in rows:
        if row not in used:
            raise ModelError(
                f"a row of [model] writers matches no parameter: {row.pattern!r}.\n"
                "  A pattern is a regex for the whole name relative to a block, such as "
                r"'mlp\.down_proj\.weight'."
            )
    writers.sort(key=lambda w: (w.layer, COMPONENT_NAMES.index(w.component), w.parameter))
    return tuple(writers)


def oriented(parameter: Tensor, writer: Writer) -> Float[Tensor, "expert hidden fan_in"]:
    """Return a view of a writer's parameter with the residual stream at axis 1.

    A matrix becomes a stack of one expert.

    Raises:
        ModelError: the parameter is on the meta device.
    """
    refuse_meta(writer.parameter, parameter)
    stacked = parameter.unsqueeze(0) if parameter.ndim == 2 else parameter
    axis = writer.hidden_axis + (parameter.ndim == 2)
    return stacked if axis == 1 else stacked.transpose(1, 2)


def post_norm_gain(
    model: nn.Module, writer: Writer, device: torch.device | None = None
) -> Float[Tensor, "hidden"] | None:
    """Return the effective weight g of the norms between `writer` and the stream, in float32.

    g is read off the norms' output: a root-mean-square norm turns a vector of ones into its
    effective weight, which is `1 + w` in some families, `w` in others. g is exact up to a common
    factor near 1 (the norm's epsilon), which does not matter.

    Args:
        model: The transformers model.
        writer: One of its writers.
        device: Where the norms compute; by default the writer's device.

    Raises:
        ModelError: the norm is not a scaling of each feature (a LayerNorm subtracts the mean).
    """
    if writer.post_norm is None:
        return None
    if device is None:
        parameter = model.get_parameter(writer.parameter)
        refuse_meta(writer.parameter, parameter)
        device = parameter.device
    gain = torch.ones(hidden_size(model), device=device)
    for name in filter(None, (writer.post_norm, writer.outer_norm)):
        gain = gain * _gain(name, model.get_submodule(name), gain.numel(), gain.device)
    return gain


def refuse_meta(name: str, parameter: Tensor) -> None:
    """Raise a `ModelError` if `parameter` has no storage, because its edit would be lost."""
    if parameter.is_meta:
        raise ModelError(
            f"{name} is on the meta device: its values are not in memory (offloaded or not "
            "loaded), so an edit would be lost.\n"
            "  Load the model on devices that hold all of it, or choose a smaller dtype."
        )


def _model_type(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _description(model: nn.Module) -> str:
    return f'model type "{text_config(model).model_type}" ({type(model).__name__})'


def _rows_of(model: nn.Module, refuse: bool) -> tuple[WriterRow, ...]:
    """Return the rows of the model's family; none if it is unknown or not supported."""
    config = text_config(model)
    for entry in UNSUPPORTED:
        if entry.model_type == config.model_type and (
            entry.setting is None or getattr(config, entry.setting) == entry.value
        ):
            if refuse:
                raise UnknownArchitecture(
                    f"{_description(model)} is not supported: {entry.reason},\n"
                    "  so editing what writes to the stream cannot keep a direction out of it.\n"
                    "  To edit some writers anyway, set [model] writers in the recipe; "
                    "see docs/architectures.md."
                )
            return ()
    table = {name: family.rows for family in FAMILIES for name in family.model_types}
    return table.get(config.model_type) or table.get(_model_type(model) or "", ())


def _check_rows(rows: Iterable[WriterRow]) -> None:
    for row in rows:
        if row.component not in COMPONENT_NAMES:
            raise ModelError(
                f"{row.component!r} is not a component; expected one of "
                f"{', '.join(COMPONENT_NAMES)}."
            )


def _claim(name: str, rows: Sequence[WriterRow]) -> WriterRow | None:
    """Return the one row that claims the parameter `name`."""
    claims = [row for row in rows if re.fullmatch(row.pattern, name)]
    if len(claims) > 1:
        patterns = " and ".join(repr(row.pattern) for row in claims)
        raise ModelError(
            f"{name} is claimed by {len(claims)} rows: {patterns}.\n"
            "  A writer must be edited once. Remove a row, or make its pattern narrower."
        )
    return claims[0] if claims else None


def _check_parameter(name: str, parameter: Tensor, row: WriterRow, hidden: int) -> None:
    """Raise a `ModelError` unless the row's hidden axis is as wide as the residual stream."""
    shape = tuple(parameter.shape)
    allowed = (0, 1) if parameter.ndim == 2 else (1, 2) if parameter.ndim == 3 else ()
    if row.hidden_axis not in allowed or shape[row.hidden_axis] != hidden:
        raise ModelError(
            f"{name} has shape {shape}; axis {row.hidden_axis} should be the residual stream, "
            f"{hidden} wide.\n"
            f"  Correct hidden_axis in the row {row.pattern!r}."
        )


def _writer(prefix: str, layer: int, block: nn.Module, name: str, row: WriterRow) -> Writer:
    """Return the writer that a row finds in a block, with its bias and the norms after it."""
    modules = dict(block.named_modules())
    present = {key for key, _ in block.named_parameters(remove_duplicate=False)}
    stem = name.removesuffix(".weight")
    biases = (row.bias,) if row.bias else (f"{stem}.bias", f"{stem}_bias")
    norms = []
    for norm in filter(None, (row.post_norm, row.outer_norm)):
        if norm.rstrip("?") in modules:
            norms.append(f"{prefix}.{norm.rstrip('?')}")
        elif not norm.endswith("?"):
            raise UnknownArchitecture(
                f"{prefix} has no norm {norm!r} between {name} and the residual stream, "
                "as the model's family should.\n  See docs/architectures.md."
            )
    bias = next((key for key in biases if key in present), None)
    return Writer(
        layer=layer,
        component=row.component,
        parameter=f"{prefix}.{name}",
        hidden_axis=row.hidden_axis,
        bias=f"{prefix}.{bias}" if bias else None,
        post_norm=norms[0] if norms else None,
        outer_norm=norms[1] if len(norms) > 1 else None,
    )


@torch.no_grad()
def _gain(name: str, norm: nn.Module, width: int, device: torch.device) -> Tensor:
    """Return what `norm` multiplies each feature by, `"hidden"`."""
    for key, parameter in norm.named_parameters():
        if not hasattr(norm, "_hf_hook"):  # which would load the weights when the norm is called
            refuse_meta(f"{name}.{key}", parameter)
    gain: Tensor = norm(torch.ones(width, device=device)).float()
    opposite: Tensor = norm(-torch.ones(width, device=device)).float()
    # A norm that subtracts the mean has nothing left of ±1, and a bias does not change sign.
    if not bool(gain.any()) or not torch.equal(gain, -opposite):
        raise ModelError(
            f"{name} ({type(norm).__name__}) does not only scale each feature, so no direction "
            "can be pulled back through it exactly.\n  See docs/architectures.md."
        )
    return gain


def _undeclared(opening: str, model: nn.Module, blocks: Mapping[int, nn.Module]) -> str:
    """Return a message that lists what could be a writer in some blocks, each listing once."""
    hidden = hidden_size(model)
    lines, shown = [opening], set[tuple[str, ...]]()
    for layer, block in blocks.items():
        listing = tuple(_candidate_lines(block, hidden))
        if listing in shown:
            continue
        shown.add(listing)
        lines.append(
            f"  Parameters of layer {layer} that could write to the residual stream "
            f"(width {hidden}):"
        )
        lines += listing or ["    none"]
    return "\n".join([*lines, _NEXT_STEP])


def _candidate_lines(block: nn.Module, hidden: int) -> list[str]:
    """Return a line for each parameter whose output axis has the width of the stream.

    The output axis is 0 in a Linear; in a stack of experts it may be either of the last two.
    """
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in block.named_parameters(remove_duplicate=False)
        if (parameter.ndim == 2 and parameter.shape[0] == hidden and "bias" not in name)
        or (parameter.ndim == 3 and hidden in parameter.shape[1:])
    }
    width = max(map(len, shapes), default=0) + 2
    return [f"    {name:<{width}}{shape}" for name, shape in shapes.items()]
