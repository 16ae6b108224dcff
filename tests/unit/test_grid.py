"""The batch grid: sizes by memory."""

import pytest
import torch

from ray_abliterate.grid import Cost, even, is_out_of_memory
from ray_abliterate.testing.tiny import tiny_model

COST = Cost(kept=1_000, read=100, logits=50_000, state=10, size=4)


def test_rows_pay_for_their_tokens_their_answers_and_their_logits() -> None:
    one = 100 * 20 + 1_000 * (20 + 30) + 50_000
    assert COST.rows(10 * one, 20, 30, 1) == 10
    assert COST.rows(10 * one - 1, 20, 30, 1) == 9
    assert COST.rows(10 * one, 20, 30, 5) == 2
    assert COST.rows(one - 1, 20, 30, 1) == 0


@pytest.mark.parametrize(
    ("count", "most", "size"), [(100, 64, 50), (64, 64, 64), (65, 64, 33), (7, 3, 3), (0, 8, 0)]
)
def test_batches_are_as_even_as_they_can_be(count: int, most: int, size: int) -> None:
    assert even(count, most) == size
    if size:
        assert size <= most and -(-count // size) == -(-count // most)


def test_a_models_cost_is_read_off_its_shapes() -> None:
    model = tiny_model("llama")
    cost = Cost.of(model, kept=128)
    assert (cost.size, cost.state, cost.kept) == (4, 4 * 32, 128)
    assert cost.logits >= 4 * 97


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
