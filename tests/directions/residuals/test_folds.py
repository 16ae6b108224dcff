"""Folds: how prompts are dealt, and statistics of all but one fold from merged parts."""

import pickle
from functools import reduce
from operator import add

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.directions.residuals.folds import FOLDS, Folds, by_fold, project_shard
from ray_abliterate.directions.residuals.moments import moments_of
from ray_abliterate.directions.residuals.shard import ResidualShard, sums_of, winsorized

TEXTS = st.lists(st.integers(0, 12), min_size=1, max_size=30)


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}{i}" for i in range(count)]


def split(values: numpy.ndarray, rows: int) -> list[ResidualShard]:
    starts = range(0, len(values), rows)
    return [ResidualShard.of("s", i, values[i : i + rows]) for i in starts]


def some(*shape: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)


def test_prompts_are_dealt_to_folds_in_turn_whatever_they_say() -> None:
    found, other = (Folds.of(names(kind, 12), names("n", 7)) for kind in ("b", "x"))
    assert found is not None and other is not None
    assert found.behaviour.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert numpy.bincount(found.neutral).tolist() in ([1, 1, 2, 2, 1], [1, 1, 1, 2, 2])
    assert pickle.dumps(found) == pickle.dumps(other)


@given(TEXTS, TEXTS, st.booleans())
def test_prompts_that_are_the_same_share_a_fold_in_both_sets_and_pairs_do(
    one: list[int], other: list[int], paired: bool
) -> None:
    if paired:
        other = (other * len(one))[: len(one)]
    found = Folds.of(one, other)
    if found is None:
        return
    where: dict[int, int] = {}
    for texts, folds in zip((one, other), found.sides, strict=True):
        assert len(folds) == len(texts)
        assert set(folds.tolist()) == set(range(found.count))
        for text, fold in zip(texts, folds, strict=True):
            assert where.setdefault(text, int(fold)) == fold
    if len(one) == len(other):
        assert numpy.array_equal(found.behaviour, found.neutral)


def test_there_are_as_many_folds_as_different_prompts_allow() -> None:
    def count(behaviour: list[str], neutral: list[str]) -> int | None:
        found = Folds.of(behaviour, neutral)
        return found.count if found else None

    assert count(names("b", 100), names("n", 100)) == FOLDS == 5
    assert count(names("b", 3), names("n", 90)) == 3
    assert count(names("b", 90), names("n", 2)) == 2
    assert count(["b"], names("n", 90)) is None
    assert count(["b"] * 30, names("n", 90)) is None, "it is the same prompt every time"
    assert count(names("b", 3) * 10, names("n", 90)) == 3
    assert count(names("b", 4), ["b0", "b1", "n", "m", "o"]) == 3, "each fold has prompts of both"


@given(st.integers(2, 30), st.integers(1, 9), st.sampled_from([1.0, 0.8]))
def test_what_all_other_folds_have_is_what_their_prompts_have(
    prompts: int, rows: int, quantile: float
) -> None:
    values = some(prompts, 3, 12) + 5
    folds = numpy.arange(prompts) % min(prompts, 4)
    columns = range(1, 3)
    for function in (sums_of, moments_of):
        parts = [by_fold(s.batch, folds, function, quantile, columns) for s in split(values, rows)]
        merged = reduce(add, parts)
        for fold in range(min(prompts, 4)):
            kept = ResidualShard.of("s", 0, values[folds != fold])
            found, direct = merged.without(fold), function(kept.batch, quantile, columns)
            for name, expected in vars(direct).items():
                numpy.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("quantile", [1.0, 0.8])
def test_every_prompt_is_projected_along_its_own_folds_directions_in_order(
    quantile: float,
) -> None:
    values, vectors = some(7, 4, 16), some(3, 2, 16, seed=1)
    folds = numpy.array([0, 1, 2, 2, 1, 0, 0])
    shards = split(values, 2)
    found = reduce(
        add, [project_shard(s.batch, vectors, folds, quantile, 2) for s in shards]
    ).values
    assert found.shape == (7, 2)
    for prompt, fold in enumerate(folds):
        for layer in range(2):
            row = winsorized(values[prompt, 2 + layer][None], quantile)[0].astype(numpy.float64)
            assert found[prompt, layer] == pytest.approx(row @ vectors[fold, layer], rel=1e-9)
