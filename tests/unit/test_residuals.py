"""Residuals: shards, Arrow, winsorisation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.residuals import Residuals, ResidualShard, join


def shards(prompts: int, batch: int) -> list[ResidualShard]:
    values = torch.randn(prompts, 3, 5, generator=torch.Generator().manual_seed(prompts))
    return [ResidualShard(i, part) for i, part in enumerate(values.split(batch))]


@given(st.integers(1, 20), st.integers(1, 7), st.randoms(use_true_random=False))
def test_shards_join_to_the_same_bits_in_any_order(
    prompts: int, batch: int, random: object
) -> None:
    parts = shards(prompts, batch)
    expected = join(parts).values
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert torch.equal(join(parts).values, expected)


def test_a_missing_or_repeated_shard_is_refused() -> None:
    parts = shards(9, 3)
    with pytest.raises(ValueError, match="each once"):
        join([parts[0], parts[2]])
    with pytest.raises(ValueError, match="each once"):
        join([*parts, parts[1]])


def test_arrow_gives_back_the_same_bits() -> None:
    residuals = Residuals(torch.randn(4, 3, 5), "abc")
    again = Residuals.from_arrow(residuals.to_arrow())
    assert torch.equal(again.values, residuals.values)
    assert again.fingerprint == "abc"


def test_a_value_that_is_not_finite_names_prompt_and_layer() -> None:
    values = torch.zeros(4, 3, 5)
    values[2, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="prompt 2 after layer 1"):
        Residuals(values)


def test_winsorising_does_not_depend_on_which_prompts_share_a_batch() -> None:
    values = torch.randn(6, 3, 40)
    values[0] *= 100
    whole = Residuals(values).winsorized(0.9).values
    alone = torch.cat([Residuals(row[None]).winsorized(0.9).values for row in values])
    assert torch.equal(whole, alone)
    assert whole[0].abs().max() < values[0].abs().max()


def test_winsorising_at_one_changes_nothing() -> None:
    residuals = Residuals(torch.randn(6, 3, 40))
    assert residuals.winsorized(1.0) is residuals


def test_means_are_float64() -> None:
    values = torch.full((3, 1, 1), 0.1)
    values[0] = 1e8
    assert Residuals(values).mean().item() == pytest.approx((1e8 + 0.2) / 3, rel=1e-12)
