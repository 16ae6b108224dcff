"""Batch sizes by memory, and how many trials share a pass."""

import pytest
import torch

from ray_abliterate.model.batch_size import (
    BatchMemory,
    MemoryCost,
    TrialRows,
    choose_trials_per_pass,
    even_batch_size,
)
from ray_abliterate.recipe import SearchSettings
from ray_abliterate.testing.tiny import tiny_model

COST = MemoryCost(kv=1_000, activations=100, logits=50_000, state=10, element=4)


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
    assert even_batch_size(count, most) == size
    if size:
        assert size <= most and -(-count // size) == -(-count // most)


def test_a_models_cost_is_read_off_its_shapes() -> None:
    model = tiny_model("llama")
    cost = MemoryCost.of(model, kv=128)
    assert (cost.element, cost.state, cost.kv) == (4, 4 * 32, 128)
    assert cost.logits >= 4 * 97


GPU = torch.device("cuda")
ROW = COST.activations * 20 + COST.kv * (20 + 30) + COST.logits
"""Bytes of a row of 20 + 30 tokens."""


def chosen(
    trials: int = 200,
    replicas: int = 1,
    most: int = 99,
    device: torch.device = GPU,
    free: int = 800 * ROW,
    rows: int = 100,
    **search: object,
) -> int:
    """Trials a pass of 100 prompts, for which 8 just fit unless said otherwise."""
    settings = SearchSettings.model_validate({"trials": trials, **search})
    memory, trial = BatchMemory(device, free, COST), TrialRows(rows, 20, 30)
    return choose_trials_per_pass(settings, replicas, most, memory, trial)


@pytest.mark.parametrize(
    ("fit", "expected"), [(900, 8), (800, 8), (799, 4), (400, 4), (399, 2), (199, 1), (50, 1)]
)
def test_as_many_trials_share_a_pass_as_fit_one_batch(fit: int, expected: int) -> None:
    assert chosen(free=fit * ROW) == expected


@pytest.mark.parametrize(
    ("rows", "device", "expected"),
    [(128, "cuda", 8), (129, "cuda", 4), (600, "cuda", 1), (100, "mps", 2), (32, "mps", 8)],
)
def test_no_more_trials_share_a_pass_than_rows_of_a_step_save_time(
    rows: int, device: str, expected: int
) -> None:
    assert chosen(free=10_000 * ROW, rows=rows, device=torch.device(device)) == expected


def test_on_a_cpu_and_where_the_model_can_not_no_trials_share_a_pass() -> None:
    assert chosen(rows=10) == 8
    assert chosen(rows=10, device=torch.device("cpu")) == 1
    assert chosen(most=1) == 1
    assert chosen(most=5) == 4


@pytest.mark.parametrize(
    ("trials", "replicas", "expected"),
    [
        (80, 1, 8),
        (79, 1, 4),
        (60, 1, 4),
        (19, 1, 1),
        (4, 1, 1),
        (200, 2, 8),
        (200, 8, 2),
        (9, 9, 1),
    ],
)
def test_a_study_has_ten_turns_or_more(trials: int, replicas: int, expected: int) -> None:
    assert chosen(trials=trials, replicas=replicas) == expected


def test_no_more_trials_share_a_pass_than_may_be_in_flight() -> None:
    """Else one replica takes the plans of others, which wait."""
    assert chosen(concurrency=4) == 4
    assert chosen(concurrency=7, replicas=2) == 2
    assert chosen(concurrency=4, replicas=4) == 1
    assert chosen(concurrency=8, batch_synchronous=True) == 1
