"""The table of families, proved on tiny random models."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_abliterate.errors import ModelError, UnknownArchitecture
from ray_abliterate.model.architecture import (
    FAMILIES,
    Writer,
    WriterRow,
    find_blocks,
    find_writers,
    hidden_size,
    oriented,
    post_norm_gain,
)
from ray_abliterate.model.families import UNSUPPORTED, families_markdown, unsupported_markdown
from ray_abliterate.recipe import COMPONENT_NAMES
from ray_abliterate.testing.architecture import (
    MOST_LEAK,
    NOTICEABLE_LEAK,
    TINY_FAMILIES,
    ArchitectureContract,
    ablate_writers,
    measure_leak,
    random_direction,
    randomised,
    tiny_config,
    tiny_model,
)

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
LLAMA_ROWS = (
    WriterRow(r"self_attn\.o_proj\.weight", "attn"),
    WriterRow(r"mlp\.down_proj\.weight", "mlp"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors are an order of magnitude slower when threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=sorted(TINY_FAMILIES))
def tiny(request):
    """One model of every family; those tests that leave it as it was share it."""
    return tiny_model(request.param)


class TestEveryFamily(ArchitectureContract):
    @pytest.fixture
    def model(self, tiny):
        return tiny


class TestRowsOfARecipe(ArchitectureContract):
    rows = LLAMA_ROWS

    @pytest.fixture
    def model(self):
        return renamed(tiny_model("llama"))


def renamed(model: nn.Module, model_type: str = "zephyr_moe") -> nn.Module:
    """Give the model's configuration a type that no table knows."""
    model.config.model_type = model_type
    return model


def test_every_model_type_of_the_table_is_proved():
    declared = {name for family in FAMILIES for name in family.model_types}
    proved = {find_type(name) for name in TINY_FAMILIES}
    assert declared == proved
    assert len(proved) >= 36


def find_type(name: str) -> str:
    return tiny_config(name).get_text_config(decoder=True).model_type


def test_every_row_of_the_table_matches_in_a_tiny_model():
    unmatched = {(family.model_types[0], row) for family in FAMILIES for row in family.rows}
    rows = {name: family for family in FAMILIES for name in family.model_types}
    for name in TINY_FAMILIES:
        model = tiny_model(name)
        family = rows[find_type(name)]
        for block in find_blocks(model)[1]:
            for parameter, _ in block.named_parameters(remove_duplicate=False):
                unmatched -= {
                    (family.model_types[0], row)
                    for row in family.rows
                    if re.fullmatch(row.pattern, parameter)
                }
    assert not unmatched


def test_no_model_type_is_declared_twice():
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert {row.component for family in FAMILIES for row in family.rows} == set(COMPONENT_NAMES)


def test_writers_are_found_in_layers_of_every_type():
    writers = find_writers(tiny_model("qwen3_next"))
    first = [w.component for w in writers if w.layer == 0]
    last = [w.component for w in writers if w.layer == 3]
    assert first == ["experts", "shared_experts", "linear_attn"]
    assert last == ["attn", "experts", "shared_experts"]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_are_not_skipped(name):
    model = tiny_model(name)
    experts = [w for w in find_writers(model) if w.component == "experts"]
    assert [w.layer for w in experts] == [0, 1, 2, 3]
    assert [w.hidden_axis for w in experts] == [2 if name == "gpt_oss" else 1] * 4
    assert all(oriented(model.get_parameter(w.parameter), w).shape[0] == 4 for w in experts)


def test_a_wrong_axis_of_square_experts_is_noticed():
    model = tiny_model("gpt_oss", intermediate_size=32)
    wrong = [
        Writer(w.layer, w.component, w.parameter, 1, w.bias, w.post_norm)
        if w.component == "experts"
        else w
        for w in find_writers(model)
    ]
    assert measure_leak(model, find_writers(model)) < MOST_LEAK
    assert measure_leak(model, wrong) > NOTICEABLE_LEAK


def test_linear_and_conv1d_writers_have_the_stream_on_their_own_axis():
    assert {w.hidden_axis for w in find_writers(tiny_model("gpt2"))} == {1}
    assert {w.hidden_axis for w in find_writers(tiny_model("llama"))} == {0}


def test_editing_layer_1_of_12_leaves_layers_10_and_11_alone():
    model = tiny_model("llama", layers=12)
    writers = [writer for writer in find_writers(model) if writer.layer == 1]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with ablate_writers(model, writers, random_direction(model)):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


def test_a_block_shared_by_two_layers_appears_once():
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    assert [writer.layer for writer in find_writers(model)] == [0, 0, 1, 1, 3, 3]
    assert measure_leak(model, find_writers(model)) < MOST_LEAK


def test_a_matrix_shared_by_two_layers_appears_once():
    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    mlps = [writer.layer for writer in find_writers(model) if writer.component == "mlp"]
    assert mlps == [0, 1, 2]
    assert measure_leak(model, find_writers(model)) < MOST_LEAK


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_an_embedding_tied_to_the_head_is_never_a_writer(name):
    model = tiny_model(name, tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert all(
        model.get_parameter(writer.parameter) is not embedding for writer in find_writers(model)
    )


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_vl", "llama4", "mistral3"])
def test_blocks_of_a_multimodal_model_are_those_of_its_language_tower(name):
    model = tiny_model(name)
    prefix, blocks = find_blocks(model)
    assert "language_model" in prefix
    assert len(blocks) == model.config.get_text_config().num_hidden_layers


def test_blocks_are_found_when_the_vision_tower_is_as_deep():
    config = tiny_config("llava")
    config.vision_config.num_hidden_layers = 4
    model = randomised(type(tiny_model("llava"))(config))
    assert find_blocks(model)[0] == "model.language_model.layers"


def test_blocks_of_a_bare_decoder_are_found():
    assert find_blocks(tiny_model("llama").model)[0] == "layers"
    assert find_writers(tiny_model("gemma3").model)[0].parameter.startswith("language_model.")


def test_blocks_that_cannot_be_told_apart_are_refused():
    model = tiny_model("llama")
    model.model.drafts = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(UnknownArchitecture, match=r"found: model\.layers, model\.drafts"):
        find_blocks(model)


def test_an_unknown_architecture_is_refused_with_what_could_write_and_the_next_step():
    with pytest.raises(UnknownArchitecture) as caught:
        find_writers(renamed(tiny_model("qwen3_moe")))
    assert str(caught.value) == (
        'no writers are declared for model type "zephyr_moe" (Qwen3MoeForCausalLM).\n'
        "  Parameters of layer 0 that could write to the residual stream (width 32):\n"
        "    self_attn.q_proj.weight   (32, 32)\n"
        "    self_attn.o_proj.weight   (32, 32)\n"
        "    mlp.experts.gate_up_proj  (4, 40, 32)\n"
        "    mlp.experts.down_proj     (4, 32, 20)\n"
        "  Add a row to ray_abliterate/model/families.py, or set [model] writers in the recipe; "
        "see docs/architectures.md."
    )


def test_an_unknown_architecture_lists_layers_of_every_structure_once():
    with pytest.raises(UnknownArchitecture) as caught:
        find_writers(renamed(tiny_model("bamba")))
    assert re.findall(r"of layer (\d+)", str(caught.value)) == ["0", "1"]
    assert "bias" not in str(caught.value)


def test_rows_of_the_recipe_stand_in_for_an_unknown_family():
    model = renamed(tiny_model("llama"))
    assert len(find_writers(model, LLAMA_ROWS)) == 8


def test_rows_of_the_recipe_add_to_a_known_family():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.extra = nn.Linear(8, 32)
    row = WriterRow(r"extra\.weight", "mixer")
    found = [w for w in find_writers(model, [row]) if w.component == "mixer"]
    assert [w.parameter for w in found] == [f"model.layers.{i}.extra.weight" for i in range(4)]
    assert found[0].bias == "model.layers.0.extra.bias"


def test_a_parameter_that_two_rows_claim_is_refused():
    loose = WriterRow(r".*down_proj\.weight", "mlp")
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight is claimed by 2 rows"):
        find_writers(tiny_model("llama"), [loose])


def test_a_pattern_matches_the_whole_name():
    model = renamed(tiny_model("qwen2_moe"))
    rows = [LLAMA_ROWS[0], WriterRow(r"experts\.down_proj", "experts", 1)]
    with pytest.raises(ModelError, match="matches no parameter"):
        find_writers(model, rows)


def test_a_layer_without_a_writer_is_refused():
    model = renamed(tiny_model("bamba"))
    with pytest.raises(UnknownArchitecture, match=r"no writer is declared for layer 0 of"):
        find_writers(model, LLAMA_ROWS[:1])


def test_a_component_that_does_not_exist_is_refused():
    row = WriterRow(r"self_attn\.o_proj\.weight", "attention")
    with pytest.raises(ModelError, match="'attention' is not a component"):
        find_writers(renamed(tiny_model("llama")), [row])


@pytest.mark.parametrize(("pattern", "axis"), [(r"mlp\.down_proj\.weight", 1), (r"mlp\..*", 0)])
def test_an_axis_that_is_not_the_stream_is_refused(pattern, axis):
    rows = [LLAMA_ROWS[0], WriterRow(pattern, "mlp", hidden_axis=axis)]
    with pytest.raises(ModelError, match="should be the residual stream, 32 wide"):
        find_writers(renamed(tiny_model("llama")), rows)


def test_a_declared_norm_that_is_not_there_is_refused():
    with pytest.raises(UnknownArchitecture, match="has no norm 'post_attention_layernorm'"):
        model = tiny_model("olmo2")
        del model.model.layers[1].post_attention_layernorm
        find_writers(model)


def test_a_parameter_without_storage_is_refused():
    model = tiny_model("llama")
    writer = find_writers(model)[0]
    model.to("meta")
    with pytest.raises(ModelError, match="is on the meta device"):
        find_writers(model)
    with pytest.raises(ModelError, match="is on the meta device"):
        oriented(model.get_parameter(writer.parameter), writer)


@pytest.mark.parametrize(("name", "offset"), [("gemma3_text", 1.0), ("olmo2", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_of_a_norm_is_its_effective_weight(name, offset, dtype):
    model = tiny_model(name).to(dtype)
    writer = find_writers(model)[0]
    weight = model.get_submodule(writer.post_norm).weight.float() + offset
    gain = post_norm_gain(model, writer)
    assert gain.dtype == torch.float32
    assert torch.allclose(gain / gain[0], weight / weight[0], rtol=1e-6)


def test_two_norms_in_a_row_multiply():
    model = tiny_model("gemma4_text/moe")
    writer = next(w for w in find_writers(model) if w.component == "experts")
    block = model.model.layers[0]
    inner = block.post_feedforward_layernorm_2.weight
    product = inner * block.post_feedforward_layernorm.weight
    gain = post_norm_gain(model, writer)
    assert torch.allclose(gain, product, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_that_subtracts_the_mean_is_refused(bias):
    model = tiny_model("olmo2")
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(32, bias=bias)
    with pytest.raises(ModelError, match="does not only scale each feature"):
        post_norm_gain(model, find_writers(model)[0])


def test_a_writer_without_a_norm_has_no_gain():
    model = tiny_model("llama")
    assert post_norm_gain(model, find_writers(model)[0]) is None
    assert hidden_size(model) == 32


def test_a_family_that_no_edit_closes_is_refused_with_the_reason():
    for entry in UNSUPPORTED:
        model = renamed(tiny_model("llama"), entry.model_type)
        if entry.setting:
            setattr(model.config, entry.setting, entry.value)
        with pytest.raises(UnknownArchitecture, match="is not supported: ") as caught:
            find_writers(model)
        assert entry.reason in str(caught.value)
        assert len(find_writers(model, LLAMA_ROWS)) == 8


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
)
def test_a_family_that_is_refused_would_leak(name, setting):
    writers = find_writers(tiny_model(name))
    assert measure_leak(tiny_model(name, **setting), writers) > NOTICEABLE_LEAK


def test_the_documentation_shows_the_table():
    text = DOCS.read_text(encoding="utf-8")
    assert families_markdown() in text
    assert unsupported_markdown() in text
