"""The two loaded processes: what they must have in common."""

import pytest

from benchmarks.versus_heretic.worker_pair import shared_shape
from ray_abliterate.search.plan import ModelShape


def test_sides_that_differ_are_not_compared():
    ours = {"layers": 4, "hidden": 8, "components": ["attn", "mlp"], "dtype": "float32"}
    ours["threads"] = 2
    peer = ours | {"components": ["attn.o_proj", "mlp.down_proj"]}
    assert shared_shape(ours, peer) == ModelShape(4, 8, ("attn", "mlp"))
    with pytest.raises(ValueError, match="dtype"):
        shared_shape(ours, peer | {"dtype": "bfloat16"})
