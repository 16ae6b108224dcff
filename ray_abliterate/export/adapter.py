"""Writes the edit alone, as a PEFT adapter for the base model: a few vectors for each writer.

The weights are written by hand in PEFT's format; PEFT itself makes the configuration only.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.ablation.planned_edits import PlannedEdits
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ExportError
from ray_abliterate.export.checkpoint_writers import StoredWriter
from ray_abliterate.export.low_rank_factors import LowRankFactors, low_rank_factors
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import Norm
from ray_abliterate.search.plan import Plan

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ERRORS = "adapter_errors.json"
PREFIX = "base_model.model."
ALWAYS = {"peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "fan_in_fan_out"}
"""Settings that the configuration file states even where they are PEFT's defaults."""


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter is for, by its Hub name and revision or a folder's own name."""

    name: str
    revision: str | None


class AdapterEdit:
    """A plan's edit of a model, as far as an adapter can hold it.

    Attributes:
        module: The skeleton.
        norm: What the edit keeps.
        planned: The writers that the plan edits, each with its directions and strength.
        edits: Computes their edits.
    """

    def __init__(
        self,
        module: nn.Module,
        targets: Sequence[StoredWriter],
        plan: Plan,
        directions: Directions,
    ) -> None:
        self.module, self.norm = module, plan.norm
        self.edits: PlannedEdits[StoredWriter] = PlannedEdits(targets, remember=False)
        self.planned = list(self.edits.edited_targets(plan, directions))

    @property
    def rank(self) -> int:
        """The most directions that are taken out of a writer."""
        return max((len(blends) for _, blends, _ in self.planned), default=0)

    @property
    def targets(self) -> list[StoredWriter]:
        """The writers that the plan edits."""
        return [target for target, *_ in self.planned]

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the tensors that the plan edits, as in the checkpoint."""
        forms = (form for t in self.targets for form in (*t.forms, *t.bias_forms))
        return tuple(name for form in forms for name in form.tensors)

    def __iter__(self) -> Iterator[tuple[StoredWriter, Edit]]:
        """Yield each writer that the plan edits, with its edit."""
        for target, blends, strength in self.planned:
            yield target, self.edits.make_edit(target, self.norm, blends, strength)


def refuse_as_adapter(edit: AdapterEdit) -> None:
    """Make sure that an adapter can hold an edit, whatever its values. Reads no weights.

    Raises:
        ExportError: it cannot; names the writer and the reason.
    """
    if not edit.planned:
        raise ExportError("the trial edits nothing, so there is no adapter to write.")
    shared = _shared_modules(edit.module)
    for target in edit.targets:
        reason = _obstacle(edit.module, target, edit.norm, shared)
        if reason is not None:
            raise ExportError(
                f"{target.writer.parameter} cannot be edited by a PEFT adapter: {reason}.\n"
                "  Export the whole model with --as merged."
            )


def _obstacle(module: nn.Module, target: StoredWriter, norm: Norm, shared: set[int]) -> str | None:
    """Return why PEFT cannot edit a writer; None if it can."""
    owner, linear = _owner(module, target), _is_linear(module, target)
    if id(owner) in shared or len(_parameter_names(module, target)) > 1:
        return "layers share it, and PEFT would change it in only one of them"
    if not linear and norm == "row":
        return "it is not a linear layer of its own (stacked experts), for which PEFT has no DoRA"
    if not linear and target.writer.bias:
        return "it is not a linear layer of its own, and PEFT cannot change the bias of such"
    return None


def _shared_modules(module: nn.Module) -> set[int]:
    """Return the ids of modules that the model has under several names."""
    counts = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


def _parameter_names(module: nn.Module, target: StoredWriter) -> list[str]:
    parameter = module.get_parameter(target.writer.parameter)
    return [n for n, p in module.named_parameters(remove_duplicate=False) if p is parameter]


def _owner(module: nn.Module, target: StoredWriter) -> nn.Module:
    return module.get_submodule(target.writer.parameter.rpartition(".")[0])


def _is_linear(module: nn.Module, target: StoredWriter) -> bool:
    """Return whether PEFT wraps the layer itself, rather than its parameter."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(_owner(module, target), nn.Linear | Conv1D)


# Writing


def write_adapter(
    edits: AdapterEdit, base: AdapterBase, limit: float, folder: Path, progress: Progress
) -> None:
    """Write `adapter_config.json`, the weights, and the error of each writer.

    Args:
        edits: The edit of the model.
        base: The model that the adapter is for.
        limit: The most that a writer's factors may lack of its edit, relative to it.
        folder: An empty folder.
        progress: Receives the largest error.

    Raises:
        ExportError: PEFT has no form for the edit, or a writer's error is above the limit.
    """
    refuse_as_adapter(edits)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    with progress.stage("adapter"):
        for number, (target, edit) in enumerate(edits, start=1):
            experts = _factors_by_expert(target, edit, edits.norm)
            errors[target.writer.parameter] = max(factors.error for factors in experts)
            tensors |= _factor_tensors(edits.module, target, experts, edits.rank)
            tensors |= _bias_tensors(target, edit)
            progress.step(number, len(edits.planned))
    refuse_inexact(errors, limit)
    _save(tensors, folder / ADAPTER_WEIGHTS)
    config = _config(edits, base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / ERRORS).write_text(json.dumps({"relative_error": errors}, indent=2) + "\n")
    worst = max(errors, key=lambda name: errors[name])
    accuracy = "they are the edit exactly"
    if errors[worst]:
        accuracy = f"the most that they lack of one is {errors[worst]:.2%} ({worst})"
    progress.note(f"adapter: low-rank factors for the edits of {len(errors)} writers; {accuracy}")


def refuse_inexact(errors: Mapping[str, float], limit: float) -> None:
    """Make sure that no writer's factors lack more of its edit than the limit.

    Raises:
        ExportError: some do; shows the worst of them.
    """
    above = sorted((e, name) for name, e in errors.items() if e > limit)[::-1]
    if not above:
        return
    lines = [f"    {error:.2%}  {name}" for error, name in above[:5]]
    more = f"\n    … and {len(above) - 5} more" if len(above) > 5 else ""
    raise ExportError(
        f"an adapter would lack more than {limit:.2%} of the edit of {len(above)} of "
        f"{len(errors)} writers:\n" + "\n".join(lines) + more + "\n"
        "  Edits that keep the norms of columns are not of low rank. Export the whole model with "
        "--as merged,\n  which is exact, or allow more with --adapter-error."
    )


def _factors_by_expert(target: StoredWriter, edit: Edit, norm: Norm) -> list[LowRankFactors]:
    if norm == "none":  # the factors are the edit's own vectors, so no weights are read
        nothing = torch.empty(0)
        return [low_rank_factors(edit, expert, nothing, norm) for expert in range(target.shape[0])]
    experts = range(target.shape[0])
    return [low_rank_factors(edit, expert, target.matrix(expert)[0], norm) for expert in experts]


def _factor_tensors(
    module: nn.Module, target: StoredWriter, experts: list[LowRankFactors], rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield factors under PEFT's names, padded with zeros up to the adapter's rank."""
    # (expert, rank, fan_in) and (expert, rank, hidden)
    inward = torch.stack([_padded(factors.inward, rank) for factors in experts])
    outward = torch.stack([_padded(factors.outward.T, rank) for factors in experts])
    stem = PREFIX + target.writer.parameter.rpartition(".")[0]
    if _is_linear(module, target):
        yield f"{stem}.lora_A.weight", inward[0]
        yield f"{stem}.lora_B.weight", outward[0].T
        if experts[0].magnitude is not None:
            # PEFT saves it without `.weight` and reads both; transformers reads this one alone.
            yield f"{stem}.lora_magnitude_vector.weight", experts[0].magnitude
        return
    # PEFT takes a stack as (expert, out, in), or (expert, in, out) if the layer says so. It orders
    # the rows of A by expert, then rank, and the columns of B by rank, then expert.
    hidden_first = target.writer.hidden_axis + target.dense == 1
    input_first = not target.dense and getattr(_owner(module, target), "is_transposed", False)
    if hidden_first == input_first:
        inward, outward = outward, inward
    yield f"{stem}.lora_A.weight", inward.flatten(0, 1)
    yield f"{stem}.lora_B.weight", outward.transpose(0, 1).flatten(0, 1).T


def _padded(vectors: Tensor, rank: int) -> Tensor:
    """Pad vectors, `"row width"`, with rows of zeros to `"rank width"`."""
    return nn.functional.pad(vectors, (0, 0, 0, rank - len(vectors)))


def _bias_tensors(target: StoredWriter, edit: Edit) -> Iterator[tuple[str, Tensor]]:
    """Yield edited biases whole, as PEFT stores those that were trained."""
    if target.writer.bias is None:
        return
    value = target.stored.load(target.bias_forms[0]).to(target.device)
    edit.apply_to_bias_(value, value)
    stem = PREFIX + target.writer.parameter.rpartition(".")[0]
    yield f"{stem}.base_layer.bias", value


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _config(edits: AdapterEdit, base: AdapterBase) -> dict[str, Any]:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    module = edits.module
    names = [t.writer.parameter for t in edits.targets if not _is_linear(module, t)]
    linear = [t.writer.parameter.rpartition(".")[0] for t in edits.targets if _is_linear(module, t)]
    config = LoraConfig(
        r=edits.rank,
        lora_alpha=edits.rank,
        target_modules=_exact_pattern(module, linear),
        target_parameters=names or None,
        use_dora=edits.norm == "row",
        bias="lora_only" if any(target.writer.bias for target in edits.targets) else "none",
        fan_in_fan_out=any(isinstance(module.get_submodule(name), Conv1D) for name in linear),
        base_model_name_or_path=base.name,
        revision=base.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    # Defaults are left out, so that other versions of PEFT, and other programs, can read the file.
    settings, defaults = config.to_dict(), LoraConfig().to_dict()
    stated = {key: v for key, v in sorted(settings.items()) if key in ALWAYS or v != defaults[key]}
    return {key: sorted(v) if isinstance(v, set) else v for key, v in stated.items()}


def _exact_pattern(module: nn.Module, names: list[str]) -> list[str] | str:
    """Return what makes PEFT wrap these modules and no others; it compares the ends of names."""
    wanted = set(names)
    all_names = [name for name, _ in module.named_modules()]
    matched = {n for n in all_names if any(n.endswith(f".{name}") for name in wanted)}
    if matched <= wanted:
        return sorted(wanted)
    return "|".join(name.replace(".", r"\.") for name in sorted(wanted))
