"""The mathematics of an edit: what a plan does to one weight matrix, in closed form.

W is a writer in (hidden, fan_in) orientation, v a unit direction, λ the strength. Every norm mode
is one *scaled low-rank edit*

    W' = diag(s) (W + a bᵀ) diag(c)

| norm     | a          | b            | s                                     | c            |
|----------|------------|--------------|---------------------------------------|--------------|
| `none`   | −λ v       | Wᵀv          | 1                                     | 1            |
| `row`    | −λ (n ⊙ v) | Ŵᵀv, Ŵ = W/n | 1/√(1 − 2λ v g + λ² v² ‖b‖²), g = Ŵ b | 1            |
| `column` | −λ v       | Wᵀv          | 1                                     | ‖W_j‖/‖W'_j‖ |

with n the row norms. Of several directions V (orthonormal) each has an a and a b of its
own; under the root of s are then sums, 1 − 2λ Σ V_r g_r + λ² Σ V_r V_s (b_rᵀb_s), and W'_j lacks
them all. Directional ablation is Arditi et al. 2024 (arXiv 2406.11717), eq. 4. What depends on W
and v alone is computed once (`compute_projections`); a trial then builds an edit from vectors.
Tensors may have a leading expert dimension: `"expert hidden fan_in"`. Knows nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.directions import Blend
from ray_abliterate.recipe import Norm

Matrix = Float[Tensor, "expert hidden fan_in"]
TINY = 1e-12
DEPENDENT = 1e-3
"""A direction that lies within this distance of the span of others adds nothing: float32 products
can't tell it from them."""


@dataclass(frozen=True)
class Projections:
    """Products of one writer with a few vectors r_l (not unit): all that its edits need.

    Attributes:
        norm: What the edits will preserve.
        rows: The vectors, `"row hidden"`: directions, or directions pulled back through a norm.
        inner: b for each row, `"row expert fan_in"`: Wᵀr, or Ŵᵀr for `row`.
        outer: Ŵ b for each row, `"row expert hidden"`; `row` only.
        norms: Row norms for `row` (`"expert hidden"`), column norms for `column`
            (`"expert fan_in"`).
        gram: Products of the rows with each other, `"row row"`.
    """

    norm: Norm
    rows: Float[Tensor, "row hidden"]
    inner: Float[Tensor, "row expert fan_in"]
    outer: Float[Tensor, "row expert hidden"] | None
    norms: Tensor | None
    gram: Float[Tensor, "row row"]


@dataclass(frozen=True)
class Edit:
    """W' = diag(s) (W + Σ a_r b_rᵀ) diag(c), per expert; `None` stands for ones.

    Attributes:
        a: The left factor of each removed direction.
        b: The right factor of each removed direction.
        s: Row scales.
        c: Column scales.
        basis: The orthonormal directions that are removed, one for each r.
        strength: λ.
    """

    a: Float[Tensor, "expert rank hidden"]
    b: Float[Tensor, "expert rank fan_in"]
    s: Float[Tensor, "expert hidden"] | None
    c: Float[Tensor, "expert fan_in"] | None
    basis: Float[Tensor, "rank hidden"]
    strength: float

    def apply_(self, target: Matrix, pristine: Matrix) -> None:
        """Write the edited `pristine` into `target`, in place: float32, one rounding at the end.

        Experts are edited one by one, so that the float32 copy is one matrix.
        """
        for expert in range(pristine.shape[0]):
            weight = pristine[expert].to(
                target.device, torch.float32, copy=True
            )  # (hidden, fan_in)
            for a, b in zip(self.a[expert], self.b[expert], strict=True):
                weight.addr_(a, b)
            if self.s is not None:
                weight.mul_(self.s[expert][:, None])
            if self.c is not None:
                weight.mul_(self.c[expert][None, :])
            target[expert].copy_(weight)

    def apply_to_bias_(self, target: Tensor, pristine: Tensor) -> None:
        """Write b' = b − λ Σ v_r (v_rᵀb) into `target`, `"hidden"` or `"expert hidden"`."""
        bias = pristine.to(target.device, torch.float32)
        edited = bias
        for direction in self.basis:
            edited = edited - self.strength * (bias @ direction)[..., None] * direction
        target.copy_(edited)


def compute_projections(
    weight: Matrix, rows: Float[Tensor, "row hidden"], norm: Norm
) -> Projections:
    """Multiply a writer by vectors, once for all trials. Arithmetic in float32.

    Args:
        weight: The pristine writer.
        rows: Vectors in the residual stream (any length).
        norm: What the edits will preserve.
    """
    rows = rows.to(weight.device, torch.float32)
    inner, outer, norms = [], [], []
    for matrix in weight:  # expert by expert, so that the float32 copy is one matrix
        full = matrix.float()
        if norm == "row":
            row_norms = full.norm(dim=1)  # n: (hidden,)
            full = full / row_norms.clamp_min(TINY)[:, None]  # Ŵ
            norms.append(row_norms)
        products = rows @ full  # (row, fan_in)
        inner.append(products)
        if norm == "row":
            outer.append(products @ full.T)  # (row, hidden)
        if norm == "column":
            norms.append(full.norm(dim=0))  # (fan_in,)
    return Projections(
        norm,
        rows,
        torch.stack(inner, dim=1),
        torch.stack(outer, dim=1) if outer else None,
        torch.stack(norms) if norms else None,
        rows @ rows.T,
    )


def join_projections(parts: Sequence[Projections]) -> Projections:
    """Return the projections of a stack of experts, given those of each expert: the same bits."""
    outer = [part.outer for part in parts if part.outer is not None]
    norms = [part.norms for part in parts if part.norms is not None]
    return replace(
        parts[0],
        inner=torch.cat([part.inner for part in parts], dim=1),
        outer=torch.cat(outer, dim=1) if outer else None,
        norms=torch.cat(norms) if norms else None,
    )


def make_edit(
    projections: Projections, blend: Blend, strength: float, further: Sequence[Blend] = ()
) -> Edit:
    """Return the edit that removes `strength` times a direction.

    It costs O(hidden + fan_in): no matrix is read.

    Args:
        projections: Those of the writer.
        blend: Rows and weights whose sum points along the direction; need not be of unit length.
        strength: λ: 0 changes nothing, 1 removes the direction, above 1 reverses it.
        further: Blends of more directions; the subspace of all of them is removed. One that lies in
            the subspace of those before it is left out.

    Raises:
        ValueError: the blend sums to nothing.
    """
    rows = list(dict.fromkeys(row for each in (blend, *further) for row, _ in each))
    orthonormal = _orthonormal(projections, rows, (blend, *further))
    # V: (rank, hidden)
    basis = torch.stack([weights @ projections.rows[rows] for weights in orthonormal])
    # b is linear in the direction, so it blends as the rows do: (expert, rank, fan_in)
    b = torch.stack(
        [torch.einsum("r,ref->ef", weights, projections.inner[rows]) for weights in orthonormal],
        dim=1,
    )
    a = (-strength * basis).expand(b.shape[0], -1, -1)
    s = c = None
    if projections.norm == "row":
        assert projections.norms is not None
        s = _row_scales(projections, rows, orthonormal, basis, b, strength)
        a = a * projections.norms[:, None]
    elif projections.norm == "column":
        assert projections.norms is not None
        wide = _widest(b)
        squares = projections.norms.to(wide).square()  # ‖W_j‖²: (expert, fan_in)
        remaining = squares
        for product in b.unbind(dim=1):
            remaining = remaining - (2 * strength - strength**2) * product.to(wide) ** 2
        floor = (TINY * squares).clamp_min(1e-30)
        c = torch.where(squares > 0, (squares / remaining.clamp_min(floor)).sqrt(), 1.0).float()
    return Edit(a.contiguous(), b, s, c, basis, strength)


def _row_scales(
    projections: Projections,
    rows: list[int],
    orthonormal: list[Tensor],
    basis: Float[Tensor, "rank hidden"],
    b: Float[Tensor, "expert rank fan_in"],
    strength: float,
) -> Float[Tensor, "expert hidden"]:
    """Return s for `row`, which gives each row its norm back (see the table above)."""
    assert projections.outer is not None
    wide, squares = _widest(b), torch.ones((), device=b.device)  # ‖row‖² / n², summed up
    for number, (weights, v) in enumerate(zip(orthonormal, basis, strict=True)):
        g = torch.einsum("r,reh->eh", weights, projections.outer[rows])  # Ŵ b
        squares = squares - 2 * strength * v * g.to(wide)
        reach = b[:, number].to(wide).square().sum(dim=1, keepdim=True)  # ‖b‖²: (expert, 1)
        squares = squares + strength**2 * v.to(wide) ** 2 * reach
        for other in range(number):
            shared = (b[:, number].to(wide) * b[:, other].to(wide)).sum(dim=1, keepdim=True)
            squares = squares + 2 * strength**2 * v.to(wide) * basis[other].to(wide) * shared
    return squares.clamp_min(TINY).rsqrt().float()


def _orthonormal(
    projections: Projections, rows: list[int], blends: Sequence[Blend]
) -> list[Float[Tensor, " row"]]:
    """Return weights of rows that sum to orthonormal vectors, by the rows' products alone.

    Gram–Schmidt in the metric of `gram`, so that no vector of the stream is touched.
    """
    device = projections.rows.device
    gram = projections.gram[rows][:, rows]
    orthonormal: list[Tensor] = []
    for blend in blends:
        weight_of_row = dict.fromkeys(rows, 0.0)
        for row, weight in blend:
            weight_of_row[row] += weight
        weights = torch.tensor(list(weight_of_row.values()), device=device)
        before = weights @ gram @ weights
        for _ in range(2 if orthonormal else 0):  # twice, because of rounding
            for other in orthonormal:
                weights = weights - (weights @ gram @ other) * other
        squared = weights @ gram @ weights  # squared length of the blended vector
        if orthonormal and not squared > DEPENDENT**2 * before:
            continue
        if not squared > 0:
            raise ValueError(f"rows {rows} blend to no direction")
        orthonormal.append(weights / squared.sqrt())
    return orthonormal


def _widest(tensor: Tensor) -> torch.dtype:
    """Return float64 where the device has it (Apple's GPUs don't).

    Norms that are preserved are differences of nearly equal numbers.
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64
