"""What an export holds in memory, on a checkpoint many times that size."""

import pytest

from benchmarks.export_memory import export_in_new_process, make_checkpoint

MARGIN = 48 * 2**20
"""Bytes beside two float32 matrices: the chunk that is copied, products, the allocator's own."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "model"
    size = make_checkpoint(folder, layers=6, hidden=1024, intermediate=4096, shard_bytes=10**8)
    return folder, size


@pytest.mark.parametrize("shard_size", [None, "50MB"])
def test_an_export_holds_two_float32_matrices_whatever_the_models_size(
    checkpoint, shard_size, tmp_path
):
    folder, size = checkpoint
    found = export_in_new_process(folder, tmp_path / "out", "row", shard_size)
    allowed = 2 * found["largest_writer_float32_bytes"] + MARGIN
    assert size > 3 * allowed
    assert found["added_bytes"] < allowed
    assert found["files"] == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
