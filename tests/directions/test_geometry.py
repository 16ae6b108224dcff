"""Pictures and numbers of two sets, against what the residuals themselves give."""

import numpy
import pytest

from ray_abliterate.directions.geometry import InnerProducts, keep_orientation
from ray_abliterate.directions.separability import silhouette_of


def two(a: int = 30, b: int = 50, hidden: int = 200, gap: float = 6.0, seed: int = 0):
    random = numpy.random.default_rng(seed)
    planted = numpy.zeros(hidden)
    planted[3] = gap
    scale = numpy.linspace(4, 0.1, hidden)
    mean = 20 * random.standard_normal(hidden)
    one, other = (random.standard_normal((count, hidden)) * scale + mean for count in (a, b))
    return (one + planted).astype(numpy.float32), other.astype(numpy.float32)


def centred(one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    middle = 0.5 * (one.astype(float).mean(axis=0) + other.astype(float).mean(axis=0))
    return numpy.concatenate([one, other]).astype(float) - middle


@pytest.mark.parametrize("hidden", [20, 200])
def test_principal_components_are_those_of_the_singular_value_decomposition(hidden):
    one, other = two(hidden=hidden)
    found, shares = InnerProducts.of(one, other).principal_plane()
    u, s, _ = numpy.linalg.svd(centred(one, other), full_matrices=False)
    direct = u[:, :2] * s[:2]
    signs = numpy.sign((direct * found).sum(axis=0))
    assert numpy.allclose(found, direct * signs, atol=1e-8)
    assert shares == pytest.approx(tuple(s[:2] ** 2 / (s**2).sum()))
    assert found[:30, 0].mean() > found[30:, 0].mean()


def test_the_plane_of_the_gap_is_the_difference_of_means_and_the_best_of_the_rest():
    one, other = two()
    found, shares = InnerProducts.of(one, other).mean_difference_plane()
    rows = centred(one, other)
    gap = one.astype(float).mean(axis=0) - other.astype(float).mean(axis=0)
    unit = gap / numpy.linalg.norm(gap)
    assert numpy.allclose(found[:, 0], rows @ unit, atol=1e-8)
    rest = rows - numpy.outer(rows @ unit, unit)
    u, s, _ = numpy.linalg.svd(rest, full_matrices=False)
    sign = numpy.sign((u[:, 0] * s[0]) @ found[:, 1])
    assert numpy.allclose(found[:, 1], sign * u[:, 0] * s[0], atol=1e-8)
    assert shares[0] == pytest.approx(((rows @ unit) ** 2).sum() / (rows**2).sum())
    assert shares[1] == pytest.approx(s[0] ** 2 / (rows**2).sum())


def test_geometry_is_that_of_the_residuals():
    one, other = (part.astype(float) for part in two())
    found = InnerProducts.of(one.astype(numpy.float32), other.astype(numpy.float32)).geometry()
    means = one.mean(axis=0), other.mean(axis=0)
    norms = [numpy.linalg.norm(part, axis=1).mean() for part in (one, other)]
    assert (found.behaviour_norm, found.neutral_norm) == pytest.approx(tuple(norms))
    assert found.gap == pytest.approx(numpy.linalg.norm(means[0] - means[1]))
    lengths = numpy.linalg.norm(means[0]) * numpy.linalg.norm(means[1])
    assert found.cosine == pytest.approx(means[0] @ means[1] / lengths)
    variances = [
        ((p - m) ** 2).sum(axis=1).mean() for p, m in zip((one, other), means, strict=True)
    ]
    assert found.spread == pytest.approx(numpy.mean(variances) ** 0.5)
    both = numpy.concatenate([one, other])
    distances = numpy.linalg.norm(both[:, None] - both[None], axis=2)
    assert found.silhouette == pytest.approx(silhouette_of(distances, len(one)))
    values = numpy.linalg.eigvalsh(centred(one, other) @ centred(one, other).T)
    assert found.dimensions == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_a_massive_activation_that_all_share_changes_no_picture():
    one, other = two()
    plain = InnerProducts.of(one, other).principal_plane()[0]
    for part in (one, other):
        part[:, 7] = 4096.0 + numpy.round(part[:, 7])  # what float32 keeps beside it
    rest = [part.copy() for part in (one, other)]
    for part in rest:
        part[:, 7] -= 4096.0
    massive, same = (
        InnerProducts.of(*parts).principal_plane()[0] for parts in ((one, other), rest)
    )
    assert numpy.allclose(massive, same, atol=1e-6)
    assert not numpy.allclose(plain, same, atol=1e-6)


def test_sets_that_are_one_point_are_drawn_at_zero():
    same = numpy.ones((4, 8), numpy.float32)
    scene = InnerProducts.of(same, same)
    for plane, shares in (scene.principal_plane(), scene.mean_difference_plane()):
        assert numpy.abs(plane).max() == 0
        assert shares == (0, 0)
    found = scene.geometry()
    assert (found.gap, found.spread, found.silhouette, found.dimensions) == (0, 0, 0, 0)
    assert found.cosine == pytest.approx(1)


def test_the_picture_does_not_flip_between_layers():
    plane = InnerProducts.of(*two()).principal_plane()[0]
    turned = plane * numpy.array([1.0, -1.0])
    assert numpy.array_equal(keep_orientation(turned, plane), plane)
    assert numpy.array_equal(keep_orientation(plane, plane), plane)
    assert keep_orientation(turned, None) is turned
