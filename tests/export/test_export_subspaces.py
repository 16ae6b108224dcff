"""Exports of several directions a layer: merged as in memory, adapters as merged."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.errors import ExportError
from ray_abliterate.model.architecture import find_writers
from tests.support.exported import (
    CLOSE,
    adapt,
    check_adapter,
    difference,
    loaded,
    plan_for,
    saved,
    write,
)

NORMS = ("none", "row", "column")
SPARING = ("gemma2", "mixtral")
"""Families whose directions spare something at the layer where they are used, too."""
LORA = ("llama", "gemma2", "gpt2", "mixtral", "llama4_text")
DORA = ("llama/biases", "gemma2", "gpt2")
EXACT = [*((family, "none") for family in LORA), *((family, "row") for family in DORA)]
DOWN = "model.layers.1.mlp.down_proj.weight"


def same_as_in_memory(module, plan, directions, exported):
    """Whether every parameter has the bits of the edit that the search makes."""
    with WeightCache(module, find_writers(module)).edited(plan, directions):
        return all(
            torch.equal(parameter, exported.get_parameter(name))
            for name, parameter in module.named_parameters()
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", ["llama/biases", "mixtral", "gemma2", "gpt_oss"])
def test_a_merged_export_of_two_directions_is_the_edit_in_memory(family, norm, tmp_path):
    source = saved(family, tmp_path / "model", torch.bfloat16)
    module = loaded(source)
    plan, directions = plan_for(module, norm, rank=2, spares=family in SPARING)
    out = write(source, plan, directions, tmp_path / "out")
    assert same_as_in_memory(module, plan, directions, loaded(out))
    edits = WeightCache(module, find_writers(module)).edits(plan, directions)
    assert {edit.a.shape[1] for _, edit in edits} == {2}


def elsewhere(norm, model):
    """A plan that takes each layer's directions from above it; two layers have fewer than two."""
    plan, directions = plan_for(model, norm, rank=2, spares=True)
    vectors, further = directions.vectors.clone(), directions.further.clone()
    vectors[1], further[1], further[2] = 0, 0, 0
    plan = replace(plan, scope="per-layer", direction_layer=0.0, source_offset=0.6)
    return plan, replace(directions, vectors=vectors, further=further)


@pytest.mark.parametrize("norm", NORMS)
def test_directions_taken_elsewhere_are_merged_as_in_memory(norm, tmp_path):
    source = saved("llama", tmp_path / "model", torch.bfloat16)
    module = loaded(source)
    plan, directions = elsewhere(norm, module)
    out = write(source, plan, directions, tmp_path / "out")
    assert same_as_in_memory(module, plan, directions, loaded(out))


# Adapters


@pytest.fixture
def made(tmp_path):
    """A family's model, the merged export and the adapter of two directions."""

    def make(family, norm, limit=1e-6):
        source = saved(family, tmp_path / "model")
        plan, directions = plan_for(loaded(source), norm, rank=2, spares=family in SPARING)
        merged = write(source, plan, directions, tmp_path / "merged")
        return source, merged, adapt(source, plan, directions, tmp_path / "adapter", limit)

    return make


@pytest.mark.parametrize(("family", "norm"), EXACT)
def test_an_adapter_of_two_directions_is_the_merged_export(family, norm, made):
    source, merged, adapter = made(family, norm)
    check_adapter(source, merged, adapter)
    config = LoraConfig.from_pretrained(str(adapter))
    assert (config.r, config.lora_alpha, config.use_dora) == (2, 2, norm == "row")
    stated = json.loads((adapter / "adapter_errors.json").read_text())["relative_error"]
    assert set(stated.values()) == {0.0}


@pytest.mark.parametrize(("family", "norm"), [("mixtral", "none"), ("llama", "row")])
def test_layers_with_fewer_directions_are_filled_up_with_zeros(family, norm, tmp_path):
    source = saved(family, tmp_path / "model")
    plan, directions = elsewhere(norm, loaded(source))
    plan = replace(plan, source_offset=None)
    merged = write(source, plan, directions, tmp_path / "merged")
    adapter = adapt(source, plan, directions, tmp_path / "adapter")
    check_adapter(source, merged, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    attention = "base_model.model.model.layers.{}.self_attn.o_proj.lora_A.weight".format
    assert [bool(row.any()) for row in tensors[attention(0)]] == [True, True]
    assert [bool(row.any()) for row in tensors[attention(2)]] == [True, False]
    assert not any("layers.1." in name for name in tensors)


def test_the_stated_error_of_a_column_edit_is_the_error(made):
    source, merged, adapter = made("mixtral", "column", limit=1.0)
    stated = json.loads((adapter / "adapter_errors.json").read_text())["relative_error"]
    base, edited = loaded(source), loaded(merged)
    before = {name: p.clone() for name, p in base.named_parameters()}
    unloaded = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert len(stated) == 8
    for name, error in stated.items():
        wanted, have = edited.get_parameter(name), unloaded.get_parameter(name)
        axes = (-2, -1)  # the worst of the experts is stated
        found = (have - wanted).norm(dim=axes) / (wanted - before[name]).norm(dim=axes)
        assert float(found.max()) == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 0.4


def test_a_column_adapter_takes_as_much_of_each_direction_out_as_the_edit(made):
    source, merged, adapter = made("llama", "column", limit=1.0)
    module = loaded(source)
    _, directions = plan_for(module, "column", rank=2)
    basis = torch.stack(
        [sum(w * directions.rows[row] for row, w in blend) for blend in directions.blends(1.3)]
    )
    pristine, wanted = module.get_parameter(DOWN).clone(), loaded(merged).get_parameter(DOWN)
    have = PeftModel.from_pretrained(module, adapter).merge_and_unload().get_parameter(DOWN)
    assert difference(basis @ have, basis @ wanted) < CLOSE
    assert ((basis @ have).norm(dim=1) < 0.2 * (basis @ pristine).norm(dim=1)).all()


def test_a_column_edit_of_two_directions_is_refused_if_too_much_lacks(made):
    with pytest.raises(ExportError, match=r"lack more than 1\.00% of the edit of 8 of 8"):
        made("llama", "column", limit=0.01)
