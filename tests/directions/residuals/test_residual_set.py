"""Residuals of whole sets: joined from shards, winsorised, refused where they are not finite."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.directions.residuals.residual_set import Residuals, join
from ray_abliterate.directions.residuals.shard import ResidualShard


def shards(prompts: int, batch: int) -> list[ResidualShard]:
    values = numpy.random.default_rng(prompts).standard_normal((prompts, 3, 5), numpy.float32)
    starts = range(0, prompts, batch)
    return [ResidualShard.of("neutral", i, values[i : i + batch]) for i in starts]


@given(st.integers(1, 20), st.integers(1, 7), st.randoms(use_true_random=False))
def test_shards_join_to_the_same_bits_in_any_order(
    prompts: int, batch: int, random: object
) -> None:
    parts = shards(prompts, batch)
    expected = numpy.concatenate([part.values() for part in parts])
    random.shuffle(parts)  # type: ignore[attr-defined]
    joined = join(parts, "abc")
    assert numpy.array_equal(joined.values.numpy(), expected)
    assert joined.fingerprint == "abc"


def test_a_missing_or_repeated_shard_is_refused() -> None:
    parts = shards(9, 3)
    with pytest.raises(ValueError, match="each prompt once"):
        join([parts[0], parts[2]])
    with pytest.raises(ValueError, match="each prompt once"):
        join([*parts, parts[1]])


def test_a_value_that_is_not_finite_names_prompt_and_layer() -> None:
    values = torch.zeros(4, 3, 5)
    values[2, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="prompt 2 after layer 1"):
        Residuals(values)


def test_winsorising_clamps_at_the_quantile_of_each_residuals_own_magnitudes() -> None:
    values = torch.randn(6, 3, 41)
    limit = torch.quantile(values.abs(), 0.9, dim=-1, keepdim=True)
    found = Residuals(values).winsorized(0.9).values
    torch.testing.assert_close(found, values.clamp(-limit, limit), rtol=1e-6, atol=0)
    assert (found != values).sum(dim=-1).eq(4).all()


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
