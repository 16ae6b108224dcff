"""Exports of tiny models without a run: a plan, directions, and the folder that comes of them."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

from ray_abliterate.directions.directions import Directions
from ray_abliterate.export.adapter import AdapterBase, AdapterEdit, write_adapter
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.checkpoint_writers import StoredWriter, stored_writers
from ray_abliterate.export.file_layout import choose_layout
from ray_abliterate.export.merged import EditedTensors, write_merged
from ray_abliterate.export.output_folder import PartialExport
from ray_abliterate.model.architecture import find_writers, text_config
from ray_abliterate.model.loading import auto_class
from ray_abliterate.model.skeleton import skeleton_of_folder
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.testing.tiny import tiny_model

CLOSE = 2e-5
"""Largest difference of logits (which are near 1) and weights in float32."""
CPU = torch.device("cpu")
WATCH = SilentProgress()


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A tiny model of a family, as a folder."""
    model = tiny_model(family)
    model.config.dtype = dtype
    model.to(dtype).save_pretrained(folder, **how)
    return folder


def loaded(folder: Path) -> Any:
    """The model of a folder, in its own dtype."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype="auto", attn_implementation="eager")
    return model.eval().requires_grad_(False)


def targets_of(folder: Path) -> list[StoredWriter]:
    module = skeleton_of_folder(folder, ModelSettings(name=str(folder)))
    return stored_writers(module, Checkpoint.open(folder), (), CPU)


def plan_for(
    model: nn.Module, norm: str, strength: float = 0.9, rank: int = 1, spares: bool = False
) -> tuple[Plan, Directions]:
    """Directions between two layers, taken out of every writer."""
    writers = find_writers(model)
    config = text_config(model)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(layers, hidden, rank, generator=generator)).Q.mT
    mean = nn.functional.normalize(torch.randn(layers, hidden, generator=generator), dim=-1)
    found = Directions(
        basis[:, 0].contiguous(),
        "random",
        {},
        basis[:, 1:].contiguous() if rank > 1 else None,
        mean if spares else None,
    )
    components = tuple(dict.fromkeys(writer.component for writer in writers))
    shape = ModelShape(layers, hidden, components)
    return Plan.uniform(shape, 1.3, norm, strength), found


def write(
    source: Path, plan: Plan, directions: Directions, to: Path, shard_bytes: int | None = None
) -> Path:
    """The merged export of a plan."""
    to.mkdir()
    checkpoint = Checkpoint.open(source)
    edited = EditedTensors(targets_of(source), plan, directions)
    layout = choose_layout(checkpoint, shard_bytes)
    write_merged(checkpoint, layout, edited, PartialExport(to, {}), SilentProgress())
    (to / ".progress.json").unlink()
    return to


def tensors_of(folder: Path) -> dict[str, str]:
    """Hash of the bytes of every stored tensor."""
    found = {}
    for name, stored in Checkpoint.open(folder).tensors.items():
        with (folder / stored.file).open("rb") as file:
            file.seek(stored.start)
            found[name] = hashlib.sha256(file.read(stored.stop - stored.start)).hexdigest()
    return found


def adapt(
    source: Path, plan: Plan, directions: Directions, to: Path, limit: float = 1.0, **base: Any
) -> Path:
    """The adapter of a plan."""
    to.mkdir()
    module = skeleton_of_folder(source, ModelSettings(name=str(source)))
    targets = stored_writers(module, Checkpoint.open(source), (), CPU)
    edit = AdapterEdit(module, targets, plan, directions)
    write_adapter(
        edit, AdapterBase(**{"name": "some/model", "revision": "abc", **base}), limit, to, WATCH
    )
    return to


def check_adapter(source: Path, merged: Path, adapter: Path) -> None:
    """Hold what PEFT and transformers make of an adapter against the merged export."""
    base, edited = loaded(source), loaded(merged)
    wanted = logits(edited)
    assert difference(wanted, logits(base)) > 100 * CLOSE
    model = PeftModel.from_pretrained(base, adapter)
    assert difference(logits(model), wanted) < CLOSE
    unloaded = model.merge_and_unload()
    for name, parameter in edited.named_parameters():
        assert difference(unloaded.get_parameter(name), parameter) < CLOSE, name
    other = loaded(source)
    found = other.load_adapter(str(adapter))
    assert not found.missing_keys and not found.unexpected_keys
    assert difference(logits(other), wanted) < CLOSE


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
        return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())
