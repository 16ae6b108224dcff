"""Adapters of tiny models, loaded by those who read them, held against the merged export."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from ray_abliterate.ablation import edit as ablation
from ray_abliterate.ablation.edit import Edit
from ray_abliterate.errors import ExportError
from ray_abliterate.export.low_rank_factors import low_rank_factors
from ray_abliterate.search.plan import Plan
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

LORA = "llama gemma2 gpt2 llama/biases mixtral qwen3_moe llama4_text gemma3 zamba2 olmo2".split()
DORA = "llama gemma2 gpt2 llama/biases gemma3 olmo2 phi".split()
EXACT = [*((family, "none") for family in LORA), *((family, "row") for family in DORA)]


@pytest.fixture
def made(tmp_path):
    """A family's model, its merged export, and its adapter."""

    def make(family, norm, limit=1e-6, dtype=torch.float32):
        source = saved(family, tmp_path / "model", dtype)
        plan, directions = plan_for(loaded(source), norm)
        merged = write(source, plan, directions, tmp_path / "merged")
        return source, merged, adapt(source, plan, directions, tmp_path / "adapter", limit)

    return make


@pytest.mark.parametrize(("family", "norm"), EXACT)
def test_an_adapter_is_the_merged_export(family, norm, made):
    check_adapter(*made(family, norm))


def test_the_stated_error_of_a_column_edit_is_the_error(made, tmp_path):
    source, merged, adapter = made("mixtral", "column", limit=1.0)
    stated = json.loads((adapter / "adapter_errors.json").read_text())["relative_error"]
    base, edited = loaded(source), loaded(merged)
    before = {name: p.clone() for name, p in base.named_parameters()}
    unloaded = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert len(stated) == 8
    for name, error in stated.items():
        pristine, wanted = before[name], edited.get_parameter(name)
        have = unloaded.get_parameter(name)
        axes = (-2, -1)  # the worst of the experts is stated
        found = (have - wanted).norm(dim=axes) / (wanted - pristine).norm(dim=axes)
        assert float(found.max()) == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 0.3


def test_a_column_adapter_takes_as_much_of_the_direction_out_as_the_edit(made):
    source, merged, adapter = made("llama", "column", limit=1.0)
    _, directions = plan_for(loaded(source), "column")
    v = directions.at(1.3)
    name = "model.layers.1.mlp.down_proj.weight"
    unloaded = PeftModel.from_pretrained(loaded(source), adapter).merge_and_unload()
    wanted = v @ loaded(merged).get_parameter(name)
    assert difference(v @ unloaded.get_parameter(name), wanted) < CLOSE


def test_an_adapter_that_lacks_too_much_is_refused_and_shown(made):
    with pytest.raises(ExportError, match=r"lack more than 1\.00% of the edit of 8 of 8") as error:
        made("llama", "column", limit=0.01)
    assert "layers." in str(error.value) and "--as merged" in str(error.value)


def test_the_base_is_its_hub_name_and_revision(made):
    _, _, adapter = made("llama", "row")
    text = (adapter / "adapter_config.json").read_text()
    config = LoraConfig.from_pretrained(str(adapter))
    assert (config.base_model_name_or_path, config.revision) == ("some/model", "abc")
    assert (config.use_dora, config.r, config.lora_alpha, config.bias) == (True, 1, 1, "none")
    assert str(adapter.parent) not in text
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert size < (adapter.parent / "model" / "model.safetensors").stat().st_size / 10


def test_only_edited_layers_are_wrapped(tmp_path):
    source = saved("llama", tmp_path / "model")
    plan, directions = plan_for(loaded(source), "none")
    attention = Plan(plan.scope, plan.direction_layer, plan.norm, plan.profiles[:1])
    assert attention.profiles[0][0] == "attn"
    adapter = adapt(source, attention, directions, tmp_path / "adapter")
    found = LoraConfig.from_pretrained(str(adapter)).target_modules
    assert found == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)}


def test_a_bfloat16_model_is_near_its_merged_export(made):
    """PEFT keeps the factors in float32; merging rounds the sum, the edit in memory once more."""
    source, merged, adapter = made("llama", "row", dtype=torch.bfloat16)
    unloaded = PeftModel.from_pretrained(loaded(source), adapter).merge_and_unload()
    step = torch.finfo(torch.bfloat16).eps
    for name, wanted in loaded(merged).named_parameters():
        have = unloaded.get_parameter(name).float()
        assert torch.all((have - wanted.float()).abs() <= 4 * step * wanted.float().abs() + 1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_rows_of_zeros_stay_zeros(rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 9, generator=generator)
    matrix[2] = 0
    products = ablation.compute_projections(
        matrix[None], torch.randn(2, 6, generator=generator), "row"
    )
    first, *others = [((row, 1.0),) for row in range(rank)]
    edit = ablation.make_edit(products, first, 0.8, others)
    wanted = matrix.clone()
    edit.apply_(wanted[None], matrix[None])
    found = low_rank_factors(edit, 0, matrix, "row")
    added = matrix + found.outward @ found.inward
    have = found.magnitude[:, None] * added / added.norm(dim=1, keepdim=True)
    assert torch.equal(have[2], torch.zeros(9))
    assert difference(have, wanted) < 1e-6


def test_writers_that_the_plan_leaves_alone_are_no_obstacle(tmp_path):
    """The stacked experts of gpt-oss have biases; its attention alone can be an adapter."""
    source = saved("gpt_oss", tmp_path / "model")
    plan, directions = plan_for(loaded(source), "none")
    experts = replace(plan, profiles=tuple(p for p in plan.profiles if p[0] == "experts"))
    with pytest.raises(ExportError, match=r"down_proj cannot be edited.*cannot change the bias"):
        adapt(source, experts, directions, tmp_path / "refused")
    attention = replace(plan, profiles=tuple(p for p in plan.profiles if p[0] == "attn"))
    adapt(source, attention, directions, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "norm", "reason"),
    [
        ("mixtral", "row", r"experts\.down_proj cannot be edited.*PEFT has no DoRA"),
        ("gpt_oss", "none", r"experts\.down_proj cannot be edited.*cannot change the bias"),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(family, norm, reason, made):
    with pytest.raises(ExportError, match=reason):
        made(family, norm)


def test_a_plan_that_edits_nothing_has_no_adapter(tmp_path):
    source = saved("llama", tmp_path / "model")
    plan, directions = plan_for(loaded(source), "none", strength=0.0)
    with pytest.raises(ExportError, match="edits nothing"):
        adapt(source, plan, directions, tmp_path / "adapter")


def test_the_factors_of_an_unedited_column_lack_nothing():
    matrix = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(1, 1, 4), torch.zeros(1, 1, 5)
    edit = Edit(*nothing, None, torch.ones(1, 5), torch.ones(1, 4) / 2, 1.0)
    assert low_rank_factors(edit, 0, matrix, "column").error == 0.0


@pytest.mark.parametrize(("family", "input_first"), [("llama", False), ("gpt2", True)])
def test_layers_that_are_stored_input_first_are_declared(family, input_first, made):
    """PEFT would find out by itself, and warn."""
    _, _, adapter = made(family, "none")
    assert (
        json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] == input_first
    )
