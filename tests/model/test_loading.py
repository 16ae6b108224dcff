"""Loading and search of checkpoints that are quantized already, each skipped without its packages.

The reference is the same model with the weights that the checkpoint's numbers stand for.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.export.export import export_trial
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.loading import load_model
from ray_abliterate.model.quantization import PACKAGES, describe_quantization
from ray_abliterate.model.skeleton import unquantized_skeleton
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.search.plan import ModelShape, Plan
from tests.support.checkpoints import KINDS
from tests.support.finished_runs import finish

HIDDEN, LAYERS = 64, 3
ROUNDING = {"compressed-tensors": 1e-6, "gptq": 5e-3, "awq": 5e-3}
"""Relative error of a pass: those of gptqmodel compute in half precision."""


@dataclass(frozen=True)
class Checkpoints:
    """A quantized checkpoint, and a full-precision one with the weights that it stands for."""

    kind: str
    folder: Path
    dense: Path

    @property
    def rounding(self) -> float:
        return ROUNDING[self.kind.partition(" ")[0]]


def marked(kind: str) -> Any:
    modules, install = PACKAGES[kind.partition(" ")[0]]
    missing = any(find_spec(name) is None for name in modules)
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"pip install {install}"))


@pytest.fixture(scope="module", params=[marked(kind) for kind in KINDS])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wide_folder: Path
) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    dense = KINDS[request.param](wide_folder, folder / "quantized")
    return Checkpoints(
        request.param, folder / "quantized", copied(wide_folder, folder / "dense", dense)
    )


def copied(original: Path, folder: Path, dense: dict[str, Tensor]) -> Path:
    """Return a copy of the original with other weights."""
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors") | dense
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path) -> Any:
    return load_model(str(folder), ModelSettings(name=str(folder)))[0]


def directions() -> Directions:
    vectors = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(3))
    return Directions(nn.functional.normalize(vectors, dim=-1), "random", {})


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_an_edit_is_that_of_the_weights_that_the_numbers_stand_for(
    made: Checkpoints, norm: Any
) -> None:
    quantized, plain = loaded(made.folder), loaded(made.dense)
    assert (
        describe_quantization(quantized).startswith(made.kind)
        and describe_quantization(plain) == ""
    )
    writers = find_writers(unquantized_skeleton(quantized), in_memory=False)
    assert writers == find_writers(plain)
    caches = WeightCache(quantized, writers), WeightCache(plain, writers)
    plan = Plan.uniform(ModelShape(LAYERS, HIDDEN, ("attn", "mlp")), 1.3, norm, 0.8)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before, base = quantized(ids).logits, plain(ids).logits
        with caches[0].edited(plan, directions()), caches[1].edited(plan, directions()):
            found, expected = quantized(ids).logits, plain(ids).logits
        assert torch.equal(quantized(ids).logits, before)
    assert (expected - base).norm() > 0.1 * base.norm()
    assert (before - base).norm() < made.rounding * base.norm()
    assert (found - expected).norm() < made.rounding * expected.norm()


def test_a_search_finds_what_it_finds_on_these_weights_and_is_exported_from_the_originals(
    made: Checkpoints, tmp_path: Path, wide_folder: Path
) -> None:
    searched, plain = finish(tmp_path / "run", made.folder), finish(tmp_path / "plain", made.dense)
    directory = searched.directory
    assert directory.read_environment()["model"]["quantization"].startswith(made.kind)
    cosines = (directory.directions().vectors * plain.directory.directions().vectors).sum(-1)
    assert cosines.min() > 1 - made.rounding
    scores, expected = searched.trial.scorecard, plain.trial.scorecard
    assert scores["keyword-rate"].value == expected["keyword-rate"].value
    nats = expected["kl-divergence"].value
    assert scores["kl-divergence"].value == pytest.approx(nats, rel=20 * made.rounding)
    to = export_trial(
        directory, searched.trial, tmp_path / "out", SilentProgress(), originals=str(wide_folder)
    )
    verification = json.loads((to / "verification.json").read_text())
    assert verification["quantization"].startswith(made.kind)
    for score in verification["scores"]:
        assert score["within"] and score["quantized"] == scores[score["name"]].value
