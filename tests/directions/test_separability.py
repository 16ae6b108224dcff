"""Measures of two samples, each against a direct computation."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.directions.separability import (
    CHANCE_LEVEL,
    auroc,
    auroc_error,
    fisher,
    measure_separability,
    mutual_information,
    overlap,
    silhouette,
    silhouette_of,
)

numbers = st.lists(st.integers(-20, 20), min_size=2, max_size=30).map(
    lambda values: numpy.array(values, float) / 4
)


def gaussians(gap: float, count: int = 4000, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    random = numpy.random.default_rng(seed)
    return random.standard_normal(count) + gap, random.standard_normal(count)


@given(numbers, numbers)
def test_auroc_counts_pairs_and_half_the_ties(a, b):
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert auroc(a, b) == pytest.approx(numpy.mean(pairs), abs=1e-12)
    assert auroc(a, b) + auroc(b, a) == pytest.approx(1)


@given(numbers, numbers)
def test_the_silhouette_of_numbers_is_that_of_their_distances(a, b):
    both = numpy.concatenate([a, b])
    direct = silhouette_of(numpy.abs(both[:, None] - both[None]), len(a))
    assert silhouette(a, b) == pytest.approx(direct, abs=1e-9)


def test_the_silhouette_is_rousseeuws():
    a, b = numpy.array([0.0, 1.0]), numpy.array([4.0, 6.0])
    by_hand = [(5 - 1) / 5, (4 - 1) / 4, (3.5 - 2) / 3.5, (5.5 - 2) / 5.5]
    expected = (sum(by_hand[:2]) / 2 + sum(by_hand[2:]) / 2) / 2
    assert silhouette(a, b) == pytest.approx(expected)


@given(numbers, numbers)
def test_the_overlap_is_what_the_best_threshold_leaves(a, b):
    cuts = numpy.concatenate([a, b])
    best = max(abs((a <= cut).mean() - (b <= cut).mean()) for cut in cuts)
    assert overlap(a, b) == pytest.approx(1 - best)


def test_the_overlap_of_two_gaussians_is_the_area_that_they_share():
    from scipy.stats import norm

    assert overlap(*gaussians(1.5, 40_000)) == pytest.approx(2 * norm.cdf(-0.75), abs=0.01)


@pytest.mark.parametrize("gap", [0.5, 1.5, 3.0])
def test_mutual_information_is_that_of_the_densities(gap):
    from scipy.stats import norm

    x = numpy.linspace(-10, 15, 100_001)
    one, other = norm.pdf(x - gap), norm.pdf(x)
    mixed = 0.5 * (one + other)
    gains = [
        0.5 * p * numpy.log2(p / mixed, where=p > 0, out=numpy.zeros_like(p)) for p in (one, other)
    ]
    exact = numpy.trapezoid(sum(gains), x)
    assert mutual_information(*gaussians(gap, 40_000)) == pytest.approx(exact, abs=0.015)
    unequal = gaussians(gap, 40_000)[0][:9000], gaussians(gap, 40_000)[1]
    assert mutual_information(*unequal) == pytest.approx(exact, abs=0.03)


def test_where_nothing_differs_the_bias_of_counting_is_taken_out():
    found = [mutual_information(*gaussians(0.0, 60, seed)) for seed in range(100)]
    assert numpy.mean(found) < 0.011  # 0.018 as counted


def test_sets_that_do_not_touch_have_all_of_everything():
    a, b = gaussians(30.0, 100)
    found = measure_separability(a, b)
    assert found["auroc"] == 1
    assert found["overlap"] == 0
    assert found["mutual_information"] == pytest.approx(1, abs=0.02)
    assert found["silhouette"] > 0.9
    assert found["fisher"] == pytest.approx((a.mean() - b.mean()) ** 2 / (a.var() + b.var()))
    assert set(found) == set(CHANCE_LEVEL)


def test_one_number_again_and_again_tells_nothing():
    same = numpy.ones(8)
    assert measure_separability(same, same) == dict(CHANCE_LEVEL)
    assert fisher(same, same + 1) == 0  # nothing to compare the distance with


def test_the_standard_error_of_an_auroc_is_its_spread_over_samples():
    areas = [auroc(*gaussians(1.0, 50, seed)) for seed in range(400)]
    assert auroc_error(float(numpy.mean(areas)), 50, 50) == pytest.approx(numpy.std(areas), rel=0.1)
    assert auroc_error(1.0, 50, 50) > 0
