"""Low-rank factors of an edit, and what they leave out of it. Knows nothing about files.

    norm     what PEFT computes                          exact
    none     W + B A                (LoRA)               yes
    row      m ⊙ rows of (W + B A), each to length 1     yes: magnitude m = ‖W_i‖ (DoRA)
    column   W + B A                (LoRA)               no: the rest of W diag(c) has full rank

LoRA is Hu et al. 2021 (arXiv 2106.09685), DoRA Liu et al. 2024 (arXiv 2402.09353).
"""

from dataclasses import dataclass

from torch import Tensor

from ray_abliterate.ablation.edit import Edit
from ray_abliterate.recipe import Norm


@dataclass(frozen=True)
class LowRankFactors:
    """The edit of one expert of a writer as an adapter stores it, in float32.

    Attributes:
        outward: PEFT's B, `"hidden rank"`.
        inward: PEFT's A, `"rank fan_in"`.
        magnitude: Lengths of the edited rows, `"hidden"`; None without DoRA.
        error: ‖edit − B A‖ / ‖edit‖ in Frobenius norm; 0 if they are the edit.
    """

    outward: Tensor
    inward: Tensor
    magnitude: Tensor | None
    error: float


def low_rank_factors(edit: Edit, expert: int, matrix: Tensor, norm: Norm) -> LowRankFactors:
    """Return what an adapter stores for one expert.

    Args:
        edit: The writer's edit.
        expert: The expert's index.
        matrix: Its pristine weights, float32 `"hidden fan_in"`; not read for `none`.
        norm: What the edit keeps.
    """
    a, b = edit.a[expert], edit.b[expert]  # (rank, hidden), (rank, fan_in)
    if norm == "none":
        return LowRankFactors(a.T, b, None, 0.0)
    if norm == "row":
        lengths = matrix.norm(dim=1)
        outward = a.T.clone()
        # A row of zeros stays one: DoRA divides by the length of W + B A, which must not be zero.
        outward[lengths == 0, 0] = 1.0
        return LowRankFactors(outward, b, lengths, 0.0)
    return _best_column_factors(edit, expert, matrix)


def _best_column_factors(edit: Edit, expert: int, matrix: Tensor) -> LowRankFactors:
    """Return the best factors whose B is the directions V, orthonormal.

        W' − W = W (diag(c) − 1) − λ Σ v_r (b_r ⊙ c)ᵀ,    A_r = (W' − W)ᵀ v_r = b_r ⊙ (c − 1 − λ c)

    They take as much of each direction out as the edit does; what is left out, W (diag(c) − 1)
    across V, restores the norms of the columns. Of its square, ‖W_j‖² − Σ b_rj² is W_j across V.
    """
    assert edit.c is not None
    b, c = edit.b[expert].double(), edit.c[expert].double()
    inward = b * (c - 1 - edit.strength * c)
    across = (matrix.double().square().sum(dim=0) - b.square().sum(dim=0)).clamp_min(0.0)
    left_out = ((c - 1).square() * across).sum()
    total = left_out + inward.square().sum()
    error = float((left_out / total).sqrt()) if total > 0 else 0.0
    return LowRankFactors(edit.basis.T, inward.float(), None, error)
