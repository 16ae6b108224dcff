"""Principal components of residuals, of their differences, and against each other."""

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.methods.inputs import (
    TINY,
    Covariances,
    Means,
    Sample,
    StreamVector,
    StreamVectors,
    needs,
)


@needs("residuals", equivariant=True)
def pca_paired(behaviour: Sample, neutral: Sample) -> StreamVectors:
    """Return the leading principal component of the differences of pairs, about zero.

    Prompt i of one set is paired with prompt i of the other. Zou et al. 2023, arXiv 2310.01405;
    taken about zero, so that the mean of the differences counts and is not subtracted.

    Raises:
        ValueError: the sets are not of equal size.
    """
    if behaviour.count != neutral.count:
        raise ValueError(
            f"pca-paired pairs prompts and needs sets of equal size; these have {behaviour.count} "
            f"and {neutral.count}.\n  Cut one with `split`, or use pca-centred, which pairs none."
        )
    pairs = behaviour.values.double() - neutral.values.double()
    rows = torch.linalg.svd(pairs, full_matrices=False).Vh[:1]
    return aligned(rows, behaviour, neutral)


@needs("covariances", equivariant=True)
def pca_centred(behaviour: Covariances, neutral: Covariances) -> StreamVectors:
    """Return the leading principal component of all residuals about the midpoint of the means.

    As `pca_center` of Vogel 2024 (repeng), with one centre for all pairs. Both sets have equal
    weight, whatever their sizes.
    """
    gap = behaviour.mean - neutral.mean
    # second moments about the midpoint, from which each mean is half the gap away
    about = 0.5 * (behaviour.covariance + neutral.covariance) + 0.25 * torch.outer(gap, gap)
    return aligned(leading(about, 1), behaviour, neutral)


@needs("covariances", equivariant=True)
def contrastive_pca(
    behaviour: Covariances, neutral: Covariances, alpha: float = 1.0
) -> StreamVectors:
    """Return what varies in the behaviour and not in neutral prompts.

    The leading eigenvector of C_b + δδᵀ − α C_n: Abid et al. 2018, Nature Communications 9, 2134. δ
    is the difference of means; with centred data alone the shift between the sets would be lost.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        alpha: α, how much the neutral prompts' own variation counts against a direction.
    """
    about = _about_neutral(behaviour, neutral) - alpha * neutral.covariance
    return aligned(leading(about, 1), behaviour, neutral)


@needs("covariances", equivariant=True)
def svd_subspace(behaviour: Covariances, neutral: Covariances, rank: int = 2) -> StreamVectors:
    """Return the leading right singular vectors of the behaviour's residuals less the neutral mean.

    Several directions at once, as in Wollschläger et al. 2025, arXiv 2502.17420, who find refusal
    to be a cone of more than one.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        rank: The number of directions.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank} must be 1 or more")
    return aligned(leading(_about_neutral(behaviour, neutral), rank), behaviour, neutral)


@needs("covariances", equivariant=True)
def neutral_components(_behaviour: Means, neutral: Covariances, count: int) -> StreamVectors:
    """Return leading principal components of the neutral prompts about their mean, as unit rows."""
    return leading(neutral.covariance, count)


def leading(symmetric: Float[Tensor, "hidden hidden"], count: int) -> StreamVectors:
    """Return the unit eigenvectors of the largest eigenvalues as rows, largest first."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors  # columns, in ascending order
    rows: StreamVectors = vectors.flip(-1)[:, :count].T.contiguous()
    return rows


def aligned(rows: StreamVectors, behaviour: Means, neutral: Means) -> StreamVectors:
    """Make rows point from neutral to behaviour, the first as long as the difference of means.

    Components have no sign of their own; where the sets' means are equal there is none to give, and
    the rows become zeros.
    """
    gap: StreamVector = behaviour.mean - neutral.mean
    signs = torch.where(rows @ gap < 0, -1.0, 1.0)
    scaled: StreamVectors = rows * signs[:, None] * gap.norm() / rows[0].norm().clamp_min(TINY)
    return scaled


def _about_neutral(behaviour: Covariances, neutral: Covariances) -> Float[Tensor, "hidden hidden"]:
    """Return the behaviour's second moments about the neutral mean."""
    gap = behaviour.mean - neutral.mean
    return behaviour.covariance + torch.outer(gap, gap)
