"""How much goes through a model at once."""

import pytest
import torch

from ray_abliterate.evaluation.streaming.pass_size import slice_rows


@pytest.mark.parametrize(
    ("vocab", "rows", "megabytes"), [(4096, 256, 4), (49_152, 128, 24), (256_000, 65, 64)]
)
def test_slices_of_logits_are_small_but_not_so_small_that_they_multiply_slowly(
    vocab, rows, megabytes
):
    assert slice_rows(vocab, torch.device("cpu")) == rows
    assert rows * vocab * 4 <= megabytes * 2**20


def test_a_gpu_gets_larger_slices_and_the_largest_vocabulary_one_row():
    assert slice_rows(256_000, torch.device("cuda")) == 262
    assert slice_rows(10**9, torch.device("cpu")) == 1
