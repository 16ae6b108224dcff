"""What devices offer, and errors that say that their memory ran out."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.model.devices import device_of, is_out_of_memory, nearest_existing_folder


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_module_without_tensors_computes_on_the_cpu() -> None:
    assert device_of(torch.nn.ReLU()) == torch.device("cpu")


def test_the_nearest_existing_folder_is_the_folder_itself_or_a_parent(tmp_path: Path) -> None:
    assert nearest_existing_folder(tmp_path) == tmp_path
    assert nearest_existing_folder(tmp_path / "not" / "there") == tmp_path
