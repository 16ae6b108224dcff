"""Merged exports of tiny models, held against the edit that the search makes in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_abliterate.ablation import planned_edits as edits
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.errors import ExportError, ModelError
from ray_abliterate.export.checkpoint import INDEX, Checkpoint
from ray_abliterate.export.file_layout import parse_size
from ray_abliterate.model.architecture import find_writers
from tests.support.exported import loaded, plan_for, saved, targets_of, tensors_of, write


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def test_products_beyond_the_budget_give_the_searchs_bits_too(tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "PROJECTION_BUDGET_BYTES", 10_000)
    source = saved("mixtral", tmp_path / "model", torch.bfloat16)
    module = loaded(source)
    plan, directions = plan_for(module, "row")
    out = loaded(write(source, plan, directions, tmp_path / "out"))
    cache = WeightCache(module, find_writers(module))
    with cache.edited(plan, directions):
        kept = cache._edits._stored
        assert 0 < len(kept) < len(cache.writers)
        for name, parameter in module.named_parameters():
            assert same_bits(parameter, out.get_parameter(name)), name


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_stacks_that_are_stored_transposed_are_edited_so(norm, tmp_path):
    """As the first checkpoints of Qwen3-VL-MoE hold them: (expert, in, out)."""
    source = saved("qwen3_vl_moe", tmp_path / "model", torch.bfloat16)
    path = source / "model.safetensors"
    stacks = {n: t for n, t in load_file(path).items() if "experts." in n}
    turned = {name: tensor.transpose(1, 2).contiguous() for name, tensor in stacks.items()}
    assert len(turned) == 8
    save_file(load_file(path) | turned, path, metadata={"format": "pt"})
    module = loaded(source)
    plan, directions = plan_for(module, norm)
    out = write(source, plan, directions, tmp_path / "out")
    assert {f.kind for t in targets_of(source) for f in t.forms} == {"whole", "transposed"}
    exported = loaded(out)
    with WeightCache(module, find_writers(module)).edited(plan, directions):
        for name, parameter in module.named_parameters():
            assert same_bits(parameter, exported.get_parameter(name)), name


def test_a_float32_checkpoint_is_edited_in_float32_whatever_the_model_runs_in(tmp_path):
    source = saved("llama", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    plan, directions = plan_for(loaded(source), "row")
    out = write(source, plan, directions, tmp_path / "out")
    assert {stored.dtype for stored in Checkpoint.open(out).tensors.values()} == {"F32"}
    module = loaded(source).float()
    assert not torch.equal(
        module.model.layers[0].mlp.down_proj.weight,
        Checkpoint.open(source).read("model.layers.0.mlp.down_proj.weight"),
    )
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        value = Checkpoint.open(out).read(name)
        assert not torch.equal(value, value.bfloat16().float())


def test_a_plan_that_does_nothing_writes_the_originals_files(tmp_path):
    source = saved("mixtral", tmp_path / "model", max_shard_size="40KB")
    plan, directions = plan_for(loaded(source), "row", strength=0.0)
    out = write(source, plan, directions, tmp_path / "out")
    names = {path.name for path in source.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        name: (source / name).read_bytes() for name in names
    }


# New files


@pytest.mark.parametrize("size", ["30KB", "1TB"])
def test_other_shards_hold_the_same_tensors(size, tmp_path):
    source = saved("mixtral", tmp_path / "model", max_shard_size="100KB")
    plan, directions = plan_for(loaded(source), "column")
    kept = write(source, plan, directions, tmp_path / "kept")
    out = write(source, plan, directions, tmp_path / "out", parse_size(size))
    assert tensors_of(out) == tensors_of(kept)
    tensors = Checkpoint.open(out).tensors
    per_file = {}
    for stored in tensors.values():
        per_file.setdefault(stored.file, []).append(stored.stop - stored.start)
    if size == "1TB":
        assert set(per_file) == {"model.safetensors"}
        assert not (out / INDEX).exists()
    else:
        index = json.loads((out / INDEX).read_text())
        original = json.loads((source / INDEX).read_text())
        assert index["metadata"] == original["metadata"]
        assert index["weight_map"] == {name: stored.file for name, stored in tensors.items()}
        assert len(per_file) > len(list(source.glob("*.safetensors")))
        assert all(sum(sizes) <= 30_000 or len(sizes) == 1 for sizes in per_file.values())
    first, second = loaded(kept), loaded(out)
    for name, parameter in first.named_parameters():
        assert same_bits(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize("text", ["", "5", "5 apples", "-1GB", "0GB", "1e3MB"])
def test_a_shard_size_that_is_none_is_refused(text):
    with pytest.raises(ExportError, match="is not a size; write 5GB"):
        parse_size(text)


def test_shard_sizes_are_decimal_or_binary():
    assert (parse_size("5GB"), parse_size("1.5 mb"), parse_size("2MiB")) == (
        5 * 10**9,
        1_500_000,
        2 * 2**20,
    )


# Refusals


def rewritten(folder, change):
    """Change the header of the one weight file, tensors as they are."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DOWN = "model.layers.2.mlp.down_proj.weight"


def test_a_writer_that_is_missing_is_named(tmp_path):
    source = saved("llama", tmp_path / "model")
    rewritten(source, lambda header: header.update({"other": header.pop(DOWN)}))
    with pytest.raises(ExportError, match=r"holds no tensor model\.layers\.2\.mlp\.down_proj"):
        targets_of(source)


def test_a_writer_of_another_shape_is_named(tmp_path):
    source = saved("llama", tmp_path / "model")
    rewritten(source, lambda header: header[DOWN].update(shape=[48, 32]))
    with pytest.raises(ExportError, match=r"layers\.2\.mlp\.down_proj.*does not have the shape"):
        targets_of(source)


def test_a_lost_expert_is_named(tmp_path):
    source = saved("mixtral", tmp_path / "model")
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewritten(source, lambda header: header.update({"other": header.pop(lost)}))
    with pytest.raises(ExportError, match=r"layers\.1.*does not have the shape"):
        targets_of(source)


def test_a_quantized_writer_is_refused(tmp_path):
    source = saved("llama", tmp_path / "model")
    rewritten(source, lambda header: header[DOWN].update(dtype="F8_E4M3", shape=[32, 192]))
    with pytest.raises(ExportError, match="stored as F8_E4M3: the checkpoint is quantized"):
        Checkpoint.open(source).read(DOWN)


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path):
    source = saved("llama", tmp_path / "model")
    plan, directions = plan_for(loaded(source), "none")
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ExportError, match="is damaged: its tensors end at byte"):
        write(source, plan, directions, tmp_path / "out")


def test_a_folder_of_gguf_files_is_refused(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    words = r"no model\.safetensors, but model-Q4_K_M\.gguf; only safetensors"
    with pytest.raises(ExportError, match=words):
        Checkpoint.open(tmp_path)


def test_a_quantized_model_is_refused_before_its_weights_are_read(tmp_path):
    source = saved("llama", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantized \(fp8\), and only full-precision weights"):
        targets_of(source)
