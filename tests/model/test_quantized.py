"""Search on quantized models: edits beside the weights are what edited weights would give."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_abliterate import beside
from ray_abliterate.architecture import find_writers
from ray_abliterate.directions import Directions
from ray_abliterate.loading import load
from ray_abliterate.plan import ModelShape, Plan
from ray_abliterate.quantization import outline
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.testing.tiny import tiny_model
from ray_abliterate.weights import WeightCache

HIDDEN, LAYERS, CPU = 64, 3, torch.device("cpu")
KINDS = ("nf4", "int8", "torchao-int8", "torchao-int4")
ROUNDING = {"nf4": 1e-2, "int8": 2e-2, "torchao-int8": 1e-5, "torchao-int4": 1e-5}
"""Relative error of a pass: nf4's CPU kernels compute in bfloat16, int8 rounds activations."""


def kinds(*names: str) -> Any:
    """Quantizations, each skipped without its package."""
    packages = {name: "torchao" if name.startswith("torchao") else "bitsandbytes" for name in names}
    missing = {name: p for name, p in packages.items() if not _is_there(p)}
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    name in missing, reason=f"pip install 'ray-abliterate[{packages[name]}]'"
                ),
            )
            for name in names
        ],
    )


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, planted_folder: Path) -> Path:
    """A Llama with biases whose rows divide into groups of 64 weights."""
    folder = tmp_path_factory.mktemp("wide") / "tiny-wide"
    model = tiny_model(
        "llama/biases", layers=LAYERS, hidden_size=HIDDEN, intermediate_size=128, head_dim=16,
        eos_token_id=2,
    )  # fmt: skip
    model.save_pretrained(folder)
    for file in [*planted_folder.glob("token*"), *planted_folder.glob("chat_template*")]:
        shutil.copy(file, folder)
    return folder


def held(folder: Path, kind: str | None, **more: Any) -> Any:
    settings = ModelSettings(name=str(folder), quantization=kind, **more)
    return load(str(folder), settings)[0]


def directions() -> Directions:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(LAYERS, HIDDEN, generator=generator)
    return Directions(nn.functional.normalize(vectors, dim=-1), "random", {})


def plan(norm: str, strength: float = 0.8) -> Plan:
    return Plan.uniform(ModelShape(LAYERS, HIDDEN, ("attn", "mlp")), 1.3, norm, strength)


@kinds(*KINDS)
@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_an_edit_beside_quantized_weights_is_the_edit_of_dequantized_ones(
    wide_folder: Path, kind: str, norm: str
) -> None:
    quantized = held(wide_folder, kind)
    writers = find_writers(outline(quantized), in_memory=False)
    plain = held(wide_folder, None)
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            matrix = beside.matrix_of(module, module.in_features, torch.float32, CPU)
            plain.get_submodule(name).weight.data.copy_(matrix)
    cache, reference = WeightCache(quantized, writers), WeightCache(plain, writers)
    assert cache.closed and not reference.closed and cache.bytes == 0
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before = quantized(ids).logits
        with cache.edited(plan(norm), directions()), reference.edited(plan(norm), directions()):
            found, expected = quantized(ids).logits, plain(ids).logits
            assert cache.differs() and cache.untouched == reference.untouched
        after, base = quantized(ids).logits, plain(ids).logits
    assert torch.equal(before, after) and not cache.differs()
    effect = (expected - base).norm()
    assert effect > 0.1 * base.norm()
    assert (found - expected).norm() < ROUNDING[kind] * expected.norm()
