"""Adapters of tiny models, loaded by those who read them, held against the merged export."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from ray_abliterate import ablation
from ray_abliterate.ablation import Edit
from ray_abliterate.errors import ExportError
from ray_abliterate.exporting.factors import factors
from ray_abliterate.plan import Plan

from .made import adapt, loaded, plan_for, saved, write

CLOSE = 2e-5
"""Largest difference of logits (which are near 1) and weights in float32."""
EXACT = [
    *((family, "none") for family in
      ("llama", "gemma2", "gpt2", "llama/biases", "mixtral", "qwen3_moe", "qwen3_vl_moe", "llama4_text", "gemma3",
       "zamba2", "olmo2", "glm4")),
    *((family, "row") for family in ("llama", "gemma2", "gpt2", "llama/biases", "gemma3", "olmo2", "phi")),
]  # fmt: skip


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits


def difference(a, b):
    return float((a - b).abs().max())


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
    source, merged, adapter = made(family, norm)
    base, edited = loaded(source), loaded(merged)
    wanted, untouched = logits(edited), logits(base)
    assert difference(wanted, untouched) > 100 * CLOSE
    model = PeftModel.from_pretrained(base, adapter)
    assert difference(logits(model), wanted) < CLOSE
    unloaded = model.merge_and_unload()
    for name, parameter in edited.named_parameters():
        assert difference(unloaded.get_parameter(name), parameter) < CLOSE, name
    other = loaded(source)
    found = other.load_adapter(str(adapter))
    assert not found.missing_keys and not found.unexpected_keys
    assert difference(logits(other), wanted) < CLOSE
