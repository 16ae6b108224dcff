"""Merged exports of every family, held against the edit that the search makes in memory."""

from itertools import cycle

import pytest
import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.testing.tiny import TINY_FAMILIES
from tests.support.exported import loaded, plan_for, saved, targets_of, tensors_of, write

NORMS = ("none", "row", "column")
EVERY_NORM = ("llama/biases", "mixtral", "gemma2", "gpt2", "gpt_oss", "qwen3_vl_moe", "zamba2")
CASES = [
    *zip(sorted(TINY_FAMILIES), cycle(NORMS), cycle((torch.float32, torch.bfloat16)), strict=False),
    *((family, norm, torch.bfloat16) for family in EVERY_NORM for norm in NORMS),
]


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    ("family", "norm", "dtype"), CASES, ids=[f"{f}-{n}-{str(d)[6:]}" for f, n, d in CASES]
)
def test_the_export_is_the_edit_in_memory_bit_for_bit(family, norm, dtype, tmp_path):
    source = saved(family, tmp_path / "model", dtype)
    module = loaded(source)
    plan, directions = plan_for(module, norm)
    out = write(source, plan, directions, tmp_path / "out")
    exported = loaded(out)
    cache = WeightCache(module, find_writers(module))
    with cache.edited(plan, directions):
        assert cache.differs()
        for name, parameter in module.named_parameters():
            assert same_bits(parameter, exported.get_parameter(name)), name
    written = {name for t in targets_of(source) for f in t.forms for name in f.tensors}
    biases = {name for t in targets_of(source) for f in t.bias_forms for name in f.tensors}
    before, after = tensors_of(source), tensors_of(out)
    changed = {name for name in before if before[name] != after[name]}
    assert written <= changed <= written | biases
