"""Headers of safetensors files: where each tensor's bytes lie, and files that are damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from ray_abliterate.data.safetensors_header import parse_header, read_header

TENSORS = {"a": torch.arange(6, dtype=torch.int32).view(2, 3), "b": torch.ones(4).bfloat16()}


def test_the_bytes_of_each_tensor_lie_where_the_header_says(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    header, data = read_header(file), file.read_bytes()
    assert header == parse_header(data)
    assert header.metadata == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("I32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    for name, tensor in TENSORS.items():
        entry = header.tensors[name]
        stored = torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=tensor.dtype)
        assert torch.equal(stored.view(tensor.shape), tensor)
    assert header.size == min(entry.start for entry in header.tensors.values())
    assert max(entry.stop for entry in header.tensors.values()) == len(data)


def test_a_file_without_metadata_has_none() -> None:
    assert parse_header(save(TENSORS)).metadata == {}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"\x10", "cut off"),
        (save(TENSORS)[:40], "cut off"),
        ((2).to_bytes(8, "little") + b"[]", "not readable"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "not readable"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_header(data)
