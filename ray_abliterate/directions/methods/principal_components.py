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


@needs("residuals", turns=True)
def pca_paired(behaviour: Sample, neutral: Sample) -> StreamVectors:
    """Leading principal component of the differences of pairs, about zero.

    Prompt i of one set belongs to prompt i of the other. Zou et al. 2023, arXiv 2310.01405; taken
    about zero, so that the mean of the differences counts and is not subtracted.

    Raises:
        ValueError: the sets are not of equal size.
    """
    if behaviour.count != neutral.count:
        raise ValueError(
            f"pca-paired needs sets of equal size, prompt by prompt; here are {behaviour.count} "
            f"and {neutral.count}.\n  Cut one with `split`, or take pca-centred; it pairs nothing."
        )
    pairs = behaviour.values.double() - neutral.values.double()
    rows = torch.linalg.svd(pairs, full_matrices=False).Vh[:1]
    return aligned(rows, behaviour, neutral)


@needs("covariances", turns=True)
def pca_centred(behaviour: Covariances, neutral: Covariances) -> StreamVectors:
    """Leading principal component of all residuals about the point half way between the means.

    As `pca_center` of Vogel 2024 (repeng), with one centre for all pairs. Both sets count the same,
    whatever their sizes.
    """
    gap = behaviour.mean - neutral.mean
    about = 0.5 * (behaviour.covariance + neutral.covariance) + 0.25 * torch.outer(gap, gap)
    return aligned(leading(about, 1), behaviour, neutral)


@needs("covariances", turns=True)
def contrastive_pca(
    behaviour: Covariances, neutral: Covariances, alpha: float = 1.0
) -> StreamVectors:
    """What varies in the behaviour and not in neutral prompts: leads C_b + δδᵀ − α C_n.

    Abid et al. 2018, Nature Communications 9, 2134. δ is the difference of means: of centred data
    alone the shift between the sets would be lost.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        alpha: How much the neutral prompts' own variation counts against a direction.
    """
    about = _about_neutral(behaviour, neutral) - alpha * neutral.covariance
    return aligned(leading(about, 1), behaviour, neutral)


@needs("covariances", turns=True)
def svd_subspace(behaviour: Covariances, neutral: Covariances, rank: int = 2) -> StreamVectors:
    """The leading right singular vectors of the behaviour's residuals less the neutral mean.

    Several directions at once, as in Wollschläger et al. 2025, arXiv 2502.17420, where refusal is
    found to be a cone of more than one.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        rank: How many.

    Raises:
        ValueError: fewer than one.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank} must be 1 or more")
    return aligned(leading(_about_neutral(behaviour, neutral), rank), behaviour, neutral)


@needs("covariances", turns=True)
def neutral_components(_behaviour: Means, neutral: Covariances, count: int) -> StreamVectors:
    """Leading principal components of the neutral prompts about their mean, as unit rows."""
    return leading(neutral.covariance, count)


def leading(symmetric: Float[Tensor, "hidden hidden"], count: int) -> StreamVectors:
    """Unit eigenvectors of the largest eigenvalues, largest first."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors
    found: StreamVectors = vectors.flip(-1)[:, :count].T.contiguous()
    return found


def aligned(rows: StreamVectors, behaviour: Means, neutral: Means) -> StreamVectors:
    """Rows that point from neutral to behaviour, the first as long as the difference of means.

    Components have no sign of their own; where the sets do not differ there is none to take, and
    nothing to find.
    """
    gap: StreamVector = behaviour.mean - neutral.mean
    signs = torch.where(rows @ gap < 0, -1.0, 1.0)
    found: StreamVectors = rows * signs[:, None] * gap.norm() / rows[0].norm().clamp_min(TINY)
    return found


def _about_neutral(behaviour: Covariances, neutral: Covariances) -> Float[Tensor, "hidden hidden"]:
    gap = behaviour.mean - neutral.mean
    return behaviour.covariance + torch.outer(gap, gap)
