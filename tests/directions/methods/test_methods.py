"""Every direction method, held to the contract; and what each does that the others don't."""

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ray_abliterate.directions import compute as finding
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.methods import inputs
from ray_abliterate.directions.methods.discriminants import (
    _fit_probe,
    leace_eraser,
    oracle_shrinkage,
)
from ray_abliterate.directions.methods.inputs import Demand, Layer, Sample, demand_of, needs
from ray_abliterate.directions.methods.mean_differences import _geometric_median
from ray_abliterate.directions.methods.principal_components import neutral_components
from ray_abliterate.directions.methods.recipe_methods import (
    need_of,
    refuse_unknown_methods,
    rows_per_layer,
)
from ray_abliterate.directions.methods.registry import METHODS
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.recipe import METHOD_NAMES, DirectionSettings
from ray_abliterate.testing.directions import DirectionMethodContract, planted_residuals

OWN = "tests.support.own_methods"


class TestMeanDifference(DirectionMethodContract):
    method = "mean-difference"
    bears_outliers = False  # every prompt counts the same


class TestMedianDifference(DirectionMethodContract):
    method = "median-difference"


class TestGeometricMedian(DirectionMethodContract):
    method = "geometric-median"


class TestMedianOfMeans(DirectionMethodContract):
    method = "median-of-means"


class TestVarianceScaled(DirectionMethodContract):
    method = "variance-scaled"
    bears_outliers = False  # means, and variances even more so


class TestIndependenceRule(DirectionMethodContract):
    method = "variance-scaled"
    options: ClassVar = {"power": 2.0}
    cosine = 0.98
    bears_outliers = False


class TestWhitened(DirectionMethodContract):
    method = "whitened"
    bears_outliers = False


class TestWhitenedHardlyShrunk(DirectionMethodContract):
    method = "whitened"
    options: ClassVar = {"shrinkage": 1e-9}
    cosine = 0.93  # 32 x 32 numbers from 400 prompts
    bears_outliers = False


class TestPcaPaired(DirectionMethodContract):
    method = "pca-paired"
    bears_outliers = False  # squares
    pairs_prompts = True


class TestPcaCentred(DirectionMethodContract):
    method = "pca-centred"
    bears_outliers = False


class TestContrastivePca(DirectionMethodContract):
    method = "contrastive-pca"
    bears_outliers = False


class TestSvdSubspace(DirectionMethodContract):
    method = "svd-subspace"
    options: ClassVar = {"rank": 3}
    bears_outliers = False


class TestLogisticProbe(DirectionMethodContract):
    method = "logistic-probe"


class TestInlp(DirectionMethodContract):
    method = "inlp"


class TestLeace(DirectionMethodContract):
    method = "leace"
    cosine = 0.93
    bears_outliers = False


class TestOwnWithoutADemand(DirectionMethodContract):
    method = f"{OWN}:trimmed_difference"


class TestOwnWithVariances(DirectionMethodContract):
    method = f"{OWN}:signal_to_noise"
    bears_outliers = False


class TestEnsemble(DirectionMethodContract):
    method = "ensemble"

    def settings(self, project: bool = True, **more: Any) -> DirectionSettings:
        members = (
            {"method": "median-difference", "weight": 0.6},
            {"method": "geometric-median", "weight": 0.3},
            {"method": f"{OWN}:trimmed_difference", "weight": 0.1, "options": {"share": 0.2}},
        )
        return DirectionSettings(
            method="ensemble", ensemble=members, project_out_neutral=project, **more
        )


# The list


def test_the_recipe_knows_the_methods_that_there_are() -> None:
    assert set(METHOD_NAMES) == set(METHODS)
    for function in METHODS.values():
        assert "arXiv" in function.__doc__ or any(c.isdigit() for c in function.__doc__), function
        assert hasattr(function, "demand"), function


def test_every_method_is_held_to_the_contract() -> None:
    held = {cls.method for cls in DirectionMethodContract.__subclasses__()}
    assert set(METHODS) <= held


@pytest.mark.parametrize(
    ("settings", "need"),
    [
        ({}, "means"),
        ({"method": "variance-scaled"}, "variances"),
        ({"method": "whitened"}, "covariances"),
        ({"method": "inlp"}, "residuals"),
        ({"method": f"{OWN}:trimmed_difference"}, "residuals"),
        ({"method": f"{OWN}:signal_to_noise"}, "variances"),
        ({"project_out_components": 1}, "covariances"),
        ({"method": "variance-scaled", "project_out_components": 1}, "covariances"),
        ({"method": "ensemble", "ensemble": [{"method": "leace"}, {"method": "mean-difference"}]},
         "covariances"),
    ],
)  # fmt: skip
def test_no_more_is_read_than_the_methods_need(settings: dict[str, Any], need: str) -> None:
    assert need_of(DirectionSettings(**settings)) == need


def test_a_need_that_is_none_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?s)'all'"):
        needs("all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "mean-diference"}, "Did you mean.*mean-difference"),
        ({"method": "ensemble"}, "needs \\[\\[direction.ensemble\\]\\]"),
        ({"ensemble": [{"method": "inlp"}]}, "ensemble is for method"),
        ({"method": "ensemble", "ensemble": [{"method": "ensemble"}]}, "not a method"),
        ({"method": "ensemble", "ensemble": [{"method": "inlp"}], "options": {"rank": 2}},
         "give them to its members"),
    ],
)  # fmt: skip
def test_a_section_that_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DirectionSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"method": "whitened", "options": {"shrink": 0.1}}, RecipeError,
         "whitened has no option 'shrink'; it has shrinkage"),
        ({"options": {"rank": 1}}, RecipeError, "has no option 'rank'; it has none"),
        ({"method": "inlp", "options": {"rank": "many"}}, RecipeError, "inlp.rank = 'many'"),
        ({"method": "ensemble", "ensemble": [{"method": "inlp", "options": {"k": 1}}]}, RecipeError,
         "inlp has no option 'k'"),
        ({"method": "no_such_module:f"}, ScoreError, "cannot be imported"),
        ({"method": f"{OWN}:nothing"}, ScoreError, "has no 'nothing'"),
        ({"method": f"{__name__}:OWN"}, RecipeError, "is not a function"),
        ({"method": "inlp", "options": {"rank": 2.0}}, RecipeError, r"(?s)inlp: .*float"),
        ({"method": f"{OWN}:trimmed_difference", "options": {"part": 0.2}}, RecipeError,
         "has no option 'part'; it has share"),
    ],
)  # fmt: skip
def test_what_a_method_lacks_is_reported_before_a_model_is_loaded(
    settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        refuse_unknown_methods(DirectionSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 1),
        ({"biproject": True}, 2),
        ({"method": "svd-subspace"}, 2),
        ({"method": "inlp", "options": {"rank": 5}, "biproject": True}, 6),
        ({"method": "ensemble", "ensemble": [{"method": "inlp"}]}, 1),
        ({"method": f"{OWN}:trimmed_difference"}, 1),
    ],
)
def test_the_products_of_writers_grow_with_directions_and_what_is_spared(
    settings: dict[str, Any], rows: int
) -> None:
    wanted = DirectionSettings(**settings)
    assert rows_per_layer(wanted) == rows
    behaviour, neutral, _ = planted_residuals(seed=0, prompts=20)
    found = directions_from_residuals(behaviour, neutral, wanted)
    assert len(found.rows) == rows * found.layers


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_methods_own_defaults_are_accepted(name: str) -> None:
    refuse_unknown_methods(DirectionSettings(method=name))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("inlp", {"rank": 0}, "rank = 0"),
        ("svd-subspace", {"rank": 0}, "rank = 0"),
        ("median-of-means", {"blocks": 0}, "blocks = 0"),
        ("logistic-probe", {"l2": 0.0}, "l2 = 0"),
        ("whitened", {"shrinkage": 2.0}, "shrinkage = 2"),
        ("whitened", {"shrinkage": 0.0}, "shrinkage = 0"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any], said: str) -> None:
    sets = planted_residuals(seed=0, prompts=5)[:2]
    settings = DirectionSettings(method=method, options=options)
    with pytest.raises(ValueError, match=said):
        directions_from_residuals(*sets, settings)
    with pytest.raises(RecipeError, match=f"direction.options: {method}: {said}"):
        refuse_unknown_methods(settings)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("of_another_width", "returned \\(1, 5\\)"),
        ("not_a_number", "returned \\(1, 32\\) with values that are not finite"),
    ],
)
def test_a_method_that_gives_no_vectors_is_named(function: str, said: str) -> None:
    sets = planted_residuals(seed=0, prompts=5)[:2]
    with pytest.raises(ValueError, match=f"{function} {said}"):
        directions_from_residuals(*sets, DirectionSettings(method=f"{OWN}:{function}"))


def test_the_length_of_a_methods_vector_does_not_matter() -> None:
    """Unless there is nothing that it could be of: the sets are the same."""
    behaviour, neutral, _ = planted_residuals(seed=0)
    one, other = Residuals(1000 * behaviour.values), Residuals(1000 * neutral.values)
    faint = DirectionSettings(method=f"{__name__}:faint")
    expected = directions_from_residuals(one, other, DirectionSettings()).vectors
    torch.testing.assert_close(directions_from_residuals(one, other, faint).vectors, expected)
    with pytest.raises(ValueError, match="no layer has a direction"):
        directions_from_residuals(one, one, faint)


@needs("means")
def faint(behaviour: inputs.Means, neutral: inputs.Means) -> torch.Tensor:
    """The difference in units of its own, with some rounding."""
    rounding = 1e-20 * torch.ones_like(neutral.mean)
    return 1e-12 * (behaviour.mean - neutral.mean) + rounding


# In the span of the residuals


@pytest.mark.parametrize("name", sorted(n for n, f in METHODS.items() if demand_of(f).equivariant))
def test_in_the_residuals_span_a_method_finds_what_it_finds_among_all_units(name: str) -> None:
    behaviour, neutral, _ = planted_residuals(seed=1, prompts=12, layers=1, hidden=60)
    sets = [Sample(s.values[:12, 0], 60) for s in (behaviour, neutral)]
    layer = Layer(*sets)
    assert len(layer.in_span[0].mean) == 24
    here = layer.find(METHODS[name])
    direct = METHODS[name](*sets)
    torch.testing.assert_close(here, direct, rtol=0, atol=1e-9)


# One by one


def correlated(seed: int = 2, prompts: int = 400) -> tuple[Residuals, Residuals, torch.Tensor]:
    """Sets that differ along a direction, among noise that is strong along another one."""
    random = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(24, 2, generator=random)).Q
    planted, loud = axes[:, 0], axes[:, 1]

    def noise() -> torch.Tensor:
        plain = torch.randn(prompts, 1, 24, generator=random)
        return plain + 30 * torch.randn(prompts, 1, 1, generator=random) * loud

    return Residuals(noise() + 4 * planted), Residuals(noise()), planted


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("whitened", {}),
        ("leace", {}),
        ("contrastive-pca", {"alpha": 1.5}),
        ("logistic-probe", {"l2": 0.01}),
    ],
)
def test_what_varies_loudly_in_both_sets_is_not_taken_for_the_direction(
    method: str, options: dict[str, Any]
) -> None:
    behaviour, neutral, planted = correlated()
    plain = DirectionSettings(method="mean-difference", project_out_neutral=False)
    own = DirectionSettings(method=method, options=options, project_out_neutral=False)
    mean = float(directions_from_residuals(behaviour, neutral, plain).vectors[0] @ planted)
    found = float(directions_from_residuals(behaviour, neutral, own).vectors[0] @ planted)
    assert found > 0.95 > mean


@pytest.mark.parametrize("method", ["whitened", "leace", "variance-scaled"])
def test_discriminants_turn_away_from_a_behaviour_that_varies_in_strength(method: str) -> None:
    """What tells sets apart need not carry the behaviour; docs/directions.md says so."""
    random = torch.Generator().manual_seed(3)
    planted = torch.zeros(24)
    planted[5] = 1.0
    shift = torch.zeros(24)
    shift[9] = 1.0  # a small, steady difference of something else

    def noise() -> torch.Tensor:
        return 0.05 * torch.randn(200, 1, 24, generator=random)

    strength = 6 + 3 * torch.randn(200, 1, 1, generator=random)
    sets = Residuals(noise() + strength * planted + 0.5 * shift), Residuals(noise())
    found = {
        name: float(
            directions_from_residuals(
                *sets, DirectionSettings(method=name, project_out_neutral=False)
            ).vectors[0]
            @ planted
        )
        for name in ("mean-difference", method)
    }
    assert found["mean-difference"] > 0.99
    assert found[method] < 0.9


def test_whitening_fully_shrunk_is_the_difference_of_means() -> None:
    behaviour, neutral, _ = correlated()
    wanted = directions_from_residuals(behaviour, neutral, DirectionSettings()).vectors
    settings = DirectionSettings(method="whitened", options={"shrinkage": 1.0})
    torch.testing.assert_close(
        directions_from_residuals(behaviour, neutral, settings).vectors, wanted
    )


def test_the_shrinkage_is_that_of_its_formula() -> None:
    s = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
    squares, trace, n, p = 18.0, 6.0, 10, 3
    expected = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
    assert oracle_shrinkage(s, n, p) == pytest.approx(min(1.0, expected))
    assert oracle_shrinkage(s, 10**6, p) < 1e-4
    assert oracle_shrinkage(torch.eye(3).double(), 10, 3) == 1.0


def test_after_leace_both_sets_have_the_same_mean_and_no_probe_works() -> None:
    behaviour, neutral, _ = correlated(prompts=200)
    sets = [Sample(s.values[:, 0].double(), 24) for s in (behaviour, neutral)]
    write, read = leace_eraser(*sets)
    middle = 0.5 * (sets[0].mean + sets[1].mean)
    erased = [s.values - torch.outer((s.values - middle) @ read, write) for s in sets]
    torch.testing.assert_close(erased[0].mean(0), erased[1].mean(0), rtol=0, atol=1e-10)
    before = _fit_probe(sets[0].values, sets[1].values, 1e-3, 24).norm()
    assert _fit_probe(*erased, 1e-3, 24).norm() < 1e-6 * before


def test_leace_takes_away_less_than_any_orthogonal_projection_along_the_difference() -> None:
    behaviour, neutral, _ = correlated(prompts=200)
    sets = [Sample(s.values[:, 0].double(), 24) for s in (behaviour, neutral)]
    write, read = leace_eraser(*sets)
    values = torch.cat([s.values for s in sets])
    values = values - values.mean(0)
    unit = write / write.norm()
    oblique = torch.outer(values @ read, write).square().sum()
    assert oblique < torch.outer(values @ unit, unit).square().sum()


def test_the_probe_is_where_the_gradient_vanishes() -> None:
    behaviour, neutral, _ = correlated(prompts=60)
    one, other = (s.values[:, 0].double() for s in (behaviour, neutral))
    found = _fit_probe(one, other, 0.5, 24)
    scale = (
        0.5 * (one.var(0, unbiased=False).sum() + other.var(0, unbiased=False).sum()) / 24
    ).sqrt()
    w = (found * scale).requires_grad_()
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    middle = 0.5 * (one.mean(0) + other.mean(0))
    optimiser = torch.optim.LBFGS([c], tolerance_grad=1e-14, max_iter=200)

    def loss() -> torch.Tensor:
        a, b = ((s - middle) / scale @ w + c for s in (one, other))
        fit = torch.nn.functional.softplus
        return 0.5 * fit(-a).mean() + 0.5 * fit(b).mean() + 0.25 * (w @ w)

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(step)
    w.grad = None
    loss().backward()
    assert w.grad is not None
    assert w.grad.abs().max() < 1e-6  # as near as the intercept is found here


@given(st.integers(0, 1000))
def test_the_geometric_median_is_where_unit_vectors_to_all_points_cancel(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(25, 4, generator=random, dtype=torch.float64)
    points[:4] *= 1000
    found = _geometric_median(points, pytest.fail)
    away = torch.nn.functional.normalize(points - found, dim=-1)
    assert away.sum(dim=0).norm() < 1e-3 or (points - found).norm(dim=-1).min() < 1e-3


def test_half_the_prompts_being_one_is_no_trouble_for_medians() -> None:
    values = torch.randn(9, 1, 8)
    values[:5] = 3.0
    found = directions_from_residuals(
        Residuals(values), Residuals(torch.randn(9, 1, 8)),
        DirectionSettings(method="geometric-median", project_out_neutral=False),
    )  # fmt: skip
    assert torch.isfinite(found.vectors).all()


def two_planted() -> tuple[Residuals, Residuals, torch.Tensor]:
    """The behaviour shows itself along one of two directions, prompt by prompt."""
    random = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(torch.randn(32, 2, generator=random)).Q.T
    strengths = torch.zeros(200, 2)
    strengths[::2, 0], strengths[1::2, 1] = 8.0, 6.0
    behaviour = torch.randn(200, 2, 32, generator=random) + (strengths @ axes)[:, None]
    return Residuals(behaviour), Residuals(torch.randn(200, 2, 32, generator=random)), axes


def test_a_subspace_of_two_holds_both_directions_that_one_vector_cannot() -> None:
    behaviour, neutral, axes = two_planted()
    settings = DirectionSettings(
        method="svd-subspace", options={"rank": 2}, project_out_neutral=False
    )
    found = directions_from_residuals(behaviour, neutral, settings)
    assert found.rank == 2
    inside = (found.basis @ axes.T).square().sum(dim=1)  # of each axis, in the subspace
    assert inside.min() > 0.97
    alone = (found.vectors @ axes.T).square()
    assert alone.min() < 0.5


def test_inlp_takes_probe_after_probe_until_none_works() -> None:
    behaviour, neutral, _ = two_planted()
    settings = DirectionSettings(method="inlp", options={"rank": 4}, project_out_neutral=False)
    found = directions_from_residuals(behaviour, neutral, settings)
    assert found.rank == 4
    left = [
        s.values[:, 0] - s.values[:, 0] @ found.basis[0].T @ found.basis[0]
        for s in (behaviour, neutral)
    ]
    first = _fit_probe(*(s.values[:, 0].double() for s in (behaviour, neutral)), 1.0, 32).norm()
    assert _fit_probe(*(s.double() for s in left), 1.0, 32).norm() < 0.1 * first


def test_neutral_components_are_spared() -> None:
    behaviour, neutral, _ = correlated()
    settings = DirectionSettings(project_out_components=2)
    found = directions_from_residuals(behaviour, neutral, settings).vectors[0].double()
    centred = neutral.values[:, 0].double() - neutral.mean()[0]
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    assert (components @ found).abs().max() < 1e-6
    assert abs(float(found @ neutral.mean()[0])) < 1e-5
    settings = DirectionSettings(project_out_neutral=False)
    plain = directions_from_residuals(behaviour, neutral, settings).vectors[0].double()
    assert (components @ plain).abs().max() > 0.1


def test_an_ensemble_is_the_weighted_sum_of_unit_vectors_with_one_sign() -> None:
    behaviour, neutral, _ = correlated()
    names, weights = ("mean-difference", "whitened"), (0.3, 0.7)
    each = [
        directions_from_residuals(
            behaviour, neutral, DirectionSettings(method=n, project_out_neutral=False)
        ).vectors
        for n in names
    ]
    members = [{"method": n, "weight": w} for n, w in zip(names, weights, strict=True)]
    settings = DirectionSettings(method="ensemble", ensemble=members, project_out_neutral=False)
    total = weights[0] * each[0] + weights[1] * each[1]
    expected = torch.nn.functional.normalize(total, dim=-1)
    torch.testing.assert_close(
        directions_from_residuals(behaviour, neutral, settings).vectors, expected
    )


def test_an_ensemble_takes_members_with_the_sign_of_the_first() -> None:
    behaviour, neutral, _ = correlated()
    members = [{"method": "mean-difference"}, {"method": f"{__name__}:backwards"}]
    both = DirectionSettings(method="ensemble", ensemble=members)
    one = directions_from_residuals(behaviour, neutral, DirectionSettings()).vectors
    torch.testing.assert_close(directions_from_residuals(behaviour, neutral, both).vectors, one)


@needs("means")
def backwards(behaviour: inputs.Means, neutral: inputs.Means) -> torch.Tensor:
    """The difference with the wrong sign."""
    return neutral.mean - behaviour.mean


def test_a_method_with_options_filled_in_asks_for_what_it_asked_for_before() -> None:
    filled = partial(METHODS["whitened"], shrinkage=0.2)
    assert demand_of(filled) == demand_of(partial(filled)) == demand_of(METHODS["whitened"])
    assert demand_of(filled) != Demand()
    own = partial(METHODS["whitened"])
    own.demand = Demand("means")  # type: ignore[attr-defined]
    assert demand_of(own) == Demand("means")
    flat = partial(lambda behaviour, neutral, by: behaviour.mean[:by], by=2)
    sets = planted_residuals(seed=1, prompts=6)[:2]
    layer = Layer(*(Sample(s.values[:, 0], 32) for s in sets))
    with pytest.raises(ValueError, match=r"functools.partial\(.* returned \(1, 2\)"):
        layer.find(flat)


def test_spared_components_of_few_prompts_are_found_in_their_span(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A covariance of all units is never made of fewer prompts than units."""
    widths = []

    def seen(behaviour: Any, neutral: Any, count: int) -> Tensor:
        widths.append(len(neutral.mean))
        return neutral_components(behaviour, neutral, count)

    monkeypatch.setattr(finding, "neutral_components", seen)
    behaviour, neutral, _ = planted_residuals(seed=1, prompts=12, layers=2, hidden=64)
    settings = DirectionSettings(project_out_components=3)
    found = directions_from_residuals(behaviour, neutral, settings)
    assert widths == [12 + 15] * 2
    for layer in range(2):
        values = neutral.values[:, layer].double()
        axes = torch.linalg.svd(values - values.mean(dim=0)).Vh[:3]
        assert (axes @ found.vectors[layer].double()).abs().max() < 1e-6
