"""Edits in closed form against a naive float64 computation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.ablation.edit import compute_projections, make_edit
from ray_abliterate.recipe import Norm

NORMS: tuple[Norm, ...] = ("none", "row", "column")
sizes = st.integers(2, 24)
strengths = st.floats(-0.5, 2.0)


def naive(weight: torch.Tensor, v: torch.Tensor, strength: float, norm: Norm) -> torch.Tensor:
    """The definition, in float64: take out, then give rows or columns their norms back."""
    w, v = weight.double(), v.double()
    if norm == "row":
        n = w.norm(dim=-1, keepdim=True)
        unit = w / n
        cut = unit - strength * v[:, None] * (v @ unit)[..., None, :]
        return n * cut / cut.norm(dim=-1, keepdim=True)
    cut = w - strength * v[:, None] * (v @ w)[..., None, :]
    if norm == "column":
        return cut * w.norm(dim=-2, keepdim=True) / cut.norm(dim=-2, keepdim=True)
    return cut


def random_case(
    experts: int, hidden: int, fan_in: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, hidden, fan_in, generator=random)
    rows = torch.randn(3, hidden, generator=random)
    return weight, torch.nn.functional.normalize(rows, dim=-1)


def applied(
    weight: torch.Tensor,
    rows: torch.Tensor,
    blend: tuple[tuple[int, float], ...],
    strength: float,
    norm: Norm,
) -> torch.Tensor:
    result = torch.empty_like(weight)
    make_edit(compute_projections(weight, rows, norm), blend, strength).apply_(result, weight)
    return result


@given(
    st.integers(1, 3), sizes, st.integers(1, 24), st.integers(0, 2**16), strengths,
    st.sampled_from(NORMS), st.floats(0, 1),
)  # fmt: skip
def test_the_closed_form_is_the_definition(
    experts: int, hidden: int, fan_in: int, seed: int, strength: float, norm: Norm, share: float
) -> None:
    weight, rows = random_case(experts, hidden, fan_in, seed)
    v = (1 - share) * rows[0].double() + share * rows[1].double()
    if v.norm() < 0.1:
        return
    expected = naive(weight, v / v.norm(), strength, norm)
    if not torch.isfinite(expected).all():
        return
    found = applied(weight, rows, ((0, 1 - share), (1, share)), strength, norm).double()
    # a row or column that an edit nearly empties is scaled up again, and its rounding with it
    cut = naive(weight, v / v.norm(), strength, "none")
    axis = -1 if norm == "row" else -2
    worst = (weight.norm(dim=axis) / cut.norm(dim=axis).clamp_min(1e-9)).max().clamp_min(1)
    tolerance = 2e-6 * float(worst) ** (1 if norm == "none" else 3) * weight.abs().max()
    assert (found - expected).abs().max() <= max(float(tolerance), 1e-5)


@given(sizes, st.integers(1, 24), st.integers(0, 2**16))
def test_removing_at_full_strength_leaves_nothing_along_the_direction(
    hidden: int, fan_in: int, seed: int
) -> None:
    weight, rows = random_case(1, hidden, fan_in, seed)
    result = applied(weight, rows, ((1, 1.0),), 1.0, "none")
    assert (rows[1] @ result[0]).abs().max() < 1e-5


def test_column_mode_leaves_nothing_along_the_direction_and_keeps_column_norms() -> None:
    weight, rows = random_case(2, 32, 48, seed=1)
    result = applied(weight, rows, ((1, 1.0),), 1.0, "column")
    assert (rows[1] @ result[0]).abs().max() < 1e-5
    torch.testing.assert_close(result.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [0.3, 1.0, 1.5])
def test_row_mode_keeps_row_norms_and_not_the_orthogonality(strength: float) -> None:
    weight, rows = random_case(2, 32, 48, seed=2)
    result = applied(weight, rows, ((0, 1.0),), strength, "row")
    torch.testing.assert_close(result.norm(dim=2), weight.norm(dim=2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7])
def test_without_normalisation_the_part_left_along_the_direction_is_one_minus_strength(
    strength: float,
) -> None:
    weight, rows = random_case(1, 32, 48, seed=3)
    before = rows[0].double() @ weight[0].double()
    after = rows[0].double() @ applied(weight, rows, ((0, 1.0),), strength, "none")[0].double()
    torch.testing.assert_close(after, (1 - strength) * before, rtol=0, atol=2e-6)


def test_a_square_writer_is_edited_on_its_output_side() -> None:
    weight, rows = random_case(1, 16, 16, seed=4)
    result = applied(weight, rows, ((0, 1.0),), 1.0, "none")[0]
    assert (rows[0] @ result).abs().max() < 1e-5
    assert (result @ rows[0]).abs().max() > 0.1


def test_a_blend_of_raw_rows_is_the_edit_of_the_unit_vector_they_sum_to() -> None:
    """Directions pulled back through a norm are not of unit length; the edit scales them."""
    weight, rows = random_case(1, 16, 24, seed=5)
    gain = torch.rand(16) + 0.5
    u = gain * (0.25 * rows[0] + 0.75 * rows[1])
    found = applied(weight, gain * rows, ((0, 0.25), (1, 0.75)), 1.0, "none")
    torch.testing.assert_close(
        found.double(), naive(weight, u / u.norm(), 1.0, "none"), rtol=0, atol=1e-5
    )


def test_arithmetic_is_float32_and_rounded_once_for_half_precision_weights() -> None:
    weight, rows = random_case(1, 32, 48, seed=6)
    half = weight.bfloat16()
    found = applied(half, rows, ((0, 1.0),), 1.0, "row")
    once = applied(half.float(), rows, ((0, 1.0),), 1.0, "row").bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, once)


def test_the_same_edit_twice_gives_the_same_bits() -> None:
    weight, rows = random_case(2, 32, 48, seed=7)
    blend = ((0, 0.4), (2, 0.6))
    first, second = (applied(weight, rows, blend, 1.1, "row") for _ in range(2))
    assert torch.equal(first, second)


def test_a_bias_loses_its_part_along_the_direction() -> None:
    weight, rows = random_case(1, 32, 48, seed=8)
    bias = torch.randn(32)
    result = bias.clone()
    make_edit(compute_projections(weight, rows, "none"), ((0, 1.0),), 1.0).apply_to_bias_(
        result, bias
    )
    assert (rows[0] @ result).abs() < 1e-6
    assert (rows[1] @ (result - bias)).abs() > 1e-3 * (rows[0] @ bias).abs()


def test_rows_and_columns_of_zeros_stay_zeros() -> None:
    weight, rows = random_case(1, 8, 12, seed=9)
    weight[0, 3], weight[0, :, 5] = 0, 0
    for norm in NORMS:
        result = applied(weight, rows, ((0, 1.0),), 1.0, norm)
        assert torch.isfinite(result).all()
        assert (result[0, :, 5] == 0).all()


def test_rows_that_cancel_are_refused() -> None:
    weight, rows = random_case(1, 8, 12, seed=10)
    with pytest.raises(ValueError, match="blend to no direction"):
        make_edit(compute_projections(weight, rows, "none"), ((0, 1.0), (0, -1.0)), 1.0)


# Several directions


def naive_subspace(
    weight: torch.Tensor, basis: torch.Tensor, strength: float, norm: Norm
) -> torch.Tensor:
    """`naive` with an orthonormal basis, `"rank hidden"`, in place of one direction."""
    w, v = weight.double(), basis.double()
    n = w.norm(dim=-1, keepdim=True) if norm == "row" else torch.ones(())
    cut = w / n - strength * v.T @ (v @ (w / n))
    if norm == "row":
        return n * cut / cut.norm(dim=-1, keepdim=True)
    if norm == "column":
        return cut * w.norm(dim=-2, keepdim=True) / cut.norm(dim=-2, keepdim=True)
    return cut


def unit(*rows: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(((row, 1.0),) for row in rows)


@given(
    st.integers(1, 3), st.integers(8, 24), st.integers(8, 24), st.integers(0, 2**16),
    st.floats(-0.5, 1.7), st.sampled_from(NORMS), st.integers(2, 3), st.booleans(),
)  # fmt: skip
def test_several_directions_are_taken_out_as_the_subspace_they_span(
    experts: int, hidden: int, fan_in: int, seed: int, strength: float, norm: Norm, rank: int,
    oblique: bool,
) -> None:  # fmt: skip
    weight, rows = random_case(experts, hidden, fan_in, seed)
    if not oblique:
        rows = torch.linalg.qr(rows.T).Q.T.contiguous()
    blends = unit(*range(rank))
    basis = torch.linalg.qr(rows[:rank].double().T).Q.T
    if (rows[:rank].double() @ rows[:rank].double().T - torch.eye(rank)).abs().max() > 0.9:
        return
    result = torch.empty_like(weight)
    found = make_edit(compute_projections(weight, rows, norm), blends[0], strength, blends[1:])
    found.apply_(result, weight)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(rank), rtol=0, atol=2e-5)
    expected = naive_subspace(weight, basis, strength, norm)
    cut = naive_subspace(weight, basis, strength, "none")
    axis = -1 if norm == "row" else -2
    worst = (weight.norm(dim=axis) / cut.norm(dim=axis).clamp_min(1e-9)).max().clamp_min(1)
    tolerance = 1e-5 * float(worst) ** (1 if norm == "none" else 3) * float(weight.abs().max())
    assert (result.double() - expected).abs().max() <= max(tolerance, 5e-5)


@pytest.mark.parametrize("norm", ["none", "column"])
def test_nothing_is_left_along_any_of_several_directions(norm: Norm) -> None:
    weight, rows = random_case(2, 32, 48, seed=11)
    result = torch.empty_like(weight)
    found = make_edit(compute_projections(weight, rows, norm), unit(0)[0], 1.0, unit(1, 2))
    found.apply_(result, weight)
    assert (rows @ result).abs().max() < 2e-5
    if norm == "column":
        torch.testing.assert_close(result.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=0)


def test_row_mode_keeps_row_norms_with_several_directions() -> None:
    weight, rows = random_case(2, 32, 48, seed=12)
    result = torch.empty_like(weight)
    make_edit(compute_projections(weight, rows, "row"), unit(0)[0], 1.3, unit(1, 2)).apply_(
        result, weight
    )
    torch.testing.assert_close(result.norm(dim=2), weight.norm(dim=2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_direction_that_others_span_already_is_not_taken_out_twice(norm: Norm) -> None:
    weight, rows = random_case(1, 16, 24, seed=13)
    results = []
    for further in (unit(1), (*unit(1), ((0, 0.3), (1, -0.7)), ((1, 2.0),))):
        result = torch.empty_like(weight)
        found = make_edit(compute_projections(weight, rows, norm), unit(0)[0], 1.0, further)
        found.apply_(result, weight)
        assert found.a.shape[1] == 2
        results.append(result)
    assert torch.equal(*results)


def test_a_bias_loses_its_part_along_every_direction() -> None:
    weight, rows = random_case(1, 32, 48, seed=14)
    bias = torch.randn(32)
    result = bias.clone()
    found = make_edit(compute_projections(weight, rows, "none"), unit(0)[0], 1.0, unit(1, 2))
    found.apply_to_bias_(result, bias)
    assert (rows @ result).abs().max() < 1e-5
