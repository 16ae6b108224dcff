"""Statistics: merged in any split and order, they are those of all residuals at once."""

from functools import reduce
from operator import add
from random import Random

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.directions.residuals.moments import (
    Moments,
    PairedMoments,
    ResidualRows,
    moments_of,
    rows_of,
)
from ray_abliterate.directions.residuals.shard import ResidualShard

cuts = st.lists(st.integers(1, 39), max_size=12, unique=True)


def some(prompts: int, hidden: int, seed: int, far: float = 0.0) -> numpy.ndarray:
    random = numpy.random.default_rng(seed)
    values: numpy.ndarray = random.standard_normal((prompts, hidden)) * random.lognormal(
        size=hidden
    )
    return (values + far).astype(numpy.float32)


def split(values: numpy.ndarray, places: list[int], seed: int) -> list[numpy.ndarray]:
    parts = [part for part in numpy.split(values, sorted(places)) if len(part)]
    Random(seed).shuffle(parts)
    return parts


def tree(parts: list[Moments], random: Random) -> Moments:
    """Added in pairs of neighbours, in an order of no plan: what associativity is about."""
    while len(parts) > 1:
        place = random.randrange(len(parts) - 1)
        parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]
    return parts[0]


def assert_direct(found: Moments, values: numpy.ndarray) -> None:
    """Within 1e-12 of the largest residual, and of its square times the count."""
    wide, largest = values.astype(numpy.float64), float(numpy.abs(values).max())
    centred = wide - wide.mean(axis=0)
    direct = centred.T @ centred if found.pairs else (centred * centred).sum(axis=0)
    assert found.count == len(values)
    assert numpy.abs(found.mean - wide.mean(axis=0)).max() <= 1e-12 * largest
    assert numpy.abs(found.scatter - direct).max() <= 1e-12 * largest**2 * len(values)


@given(cuts, st.integers(0, 2**16), st.booleans(), st.sampled_from([0.0, 1.0, 1e4]))
def test_merged_moments_are_the_direct_ones_in_any_split_and_order(
    places: list[int], seed: int, pairs: bool, far: float
) -> None:
    values = some(40, 7, seed, far)
    parts = [Moments.of(part, pairs) for part in split(values, places, seed)]
    assert_direct(reduce(add, parts), values)
    assert_direct(tree(parts, Random(seed)), values)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Sums of squares would lose them: 1e12 beside a variance of 1."""
    values = some(4000, 3, 1) + numpy.float32(1e6)
    found = reduce(add, [Moments.of(part) for part in numpy.array_split(values, 37)])
    direct = values.astype(numpy.float64).var(axis=0)
    numpy.testing.assert_allclose(found.variance, direct, rtol=1e-10)


@pytest.mark.parametrize("at_once", [1, 9, 1024])
def test_pairs_gathered_part_by_part_are_the_direct_ones(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_abliterate.directions.residuals.moments.ROWS_AT_ONCE", at_once)
    values = some(40, 7, 3, 100.0)
    gathered = reduce(
        add,
        [ResidualRows((part,)) for part in numpy.array_split(values, 11)],
        PairedMoments(Moments.empty(7)),
    )
    assert_direct(gathered.moments, values)
    assert sum(map(len, gathered.waiting.parts)) < at_once


def test_of_a_shard_are_all_layers_variances_or_the_rows_of_one() -> None:
    values = numpy.stack([some(9, 6, seed) for seed in range(3)], axis=1)
    values[4, 1, 2] = 1e6
    shards = [ResidualShard.of("s", i, values[i : i + 4]) for i in (0, 4, 8)]
    found = reduce(add, [moments_of(shard.batch) for shard in shards])
    for layer in range(3):
        assert_direct(found.layer(layer), values[:, layer])
        rows = reduce(add, [rows_of(shard.batch, layer) for shard in shards])
        assert numpy.array_equal(rows.values, values[:, layer])
    clamped = reduce(add, [rows_of(shard.batch, 1, 0.8) for shard in shards]).values
    assert numpy.abs(clamped).max() < 100
    assert_direct(reduce(add, [moments_of(s.batch, 0.8) for s in shards]).layer(1), clamped)


def test_variances_have_no_covariance_and_do_not_add_to_pairs() -> None:
    values = some(9, 4, 5)
    alone, pairs = Moments.of(values), Moments.of(values, pairs=True)
    numpy.testing.assert_allclose(alone.variance, pairs.variance, rtol=1e-13)
    numpy.testing.assert_allclose(pairs.covariance, numpy.cov(values.T, bias=True), rtol=1e-5)
    with pytest.raises(ValueError, match="no covariances"):
        _ = alone.covariance
    with pytest.raises(ValueError, match="don't add up"):
        alone + pairs
