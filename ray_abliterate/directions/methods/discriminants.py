"""Directions that tell the sets apart: discriminant analysis, probes, and what LEACE reads."""

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.directions.methods.inputs import (
    TINY,
    Covariances,
    Sample,
    StreamVector,
    StreamVectors,
    needs,
)
from ray_abliterate.directions.methods.principal_components import aligned

ROUNDS = 100
"""Newton's rounds at most; about ten are usual."""
CUT = 1e-10
"""Without shrinkage, eigenvalues below this share of the largest are rounding."""


@needs("covariances", turns=True)
def whitened(
    behaviour: Covariances, neutral: Covariances, shrinkage: float | None = None
) -> StreamVectors:
    """Fisher's linear discriminant: Σ⁻¹δ, with Σ the covariance within the sets, shrunk.

    Fisher 1936; Σ = (1 − ρ) S + ρ (tr S / hidden) 1, and ρ by the oracle approximating shrinkage
    of Chen et al. 2010, IEEE Transactions on Signal Processing 58(10), which needs S alone (Ledoit
    and Wolf's needs every residual).

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        shrinkage: ρ, above 0 and up to 1 (the difference of means); computed if not given. Next to
            nothing where prompts are fewer than units, all that counts is what varies in neither
            set.

    Raises:
        ValueError: ρ is not above 0 and up to 1.
    """
    if shrinkage is not None and not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage = {shrinkage} must be above 0 and at most 1")
    prompts, width = behaviour.count + neutral.count, neutral.width
    within = behaviour.count * behaviour.covariance + neutral.count * neutral.covariance
    within = within / prompts
    share = oracle_shrinkage(within, prompts, width) if shrinkage is None else shrinkage
    level = float(within.trace()) / width
    found = _solved(within, behaviour.mean - neutral.mean, share, level)
    return aligned(found[None], behaviour, neutral)


def oracle_shrinkage(covariance: Float[Tensor, "span span"], prompts: int, width: int) -> float:
    """ρ of Chen et al. 2010, equation 23, for the covariance of so many prompts and units."""
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    apart = (prompts + 1 - 2 / width) * (squares - trace * trace / width)
    if apart <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / width) * squares + trace * trace) / apart)


@needs("covariances", turns=True)
def leace(behaviour: Covariances, neutral: Covariances) -> StreamVectors:
    """The direction that LEACE reads the behaviour from: Σ⁺δ, with Σ the covariance of all.

    Belrose et al. 2023, arXiv 2306.03819, theorem 4.3. LEACE itself is oblique (`leace_eraser`):
    it reads along Σ⁺δ and takes away along δ. An edit of weights here is orthogonal and does both
    along one direction; this is the one that is read, without shrinkage.
    """
    return aligned(leace_eraser(behaviour, neutral)[1][None], behaviour, neutral)


def leace_eraser(behaviour: Covariances, neutral: Covariances) -> tuple[StreamVector, StreamVector]:
    """LEACE for two sets in closed form: x ↦ x − w (rᵀ (x − mean)); no linear probe works then.

    Returns:
        w = δ, and r = Σ⁺δ / (δᵀΣ⁺δ), so that both sets have the same mean afterwards; zeros where
        they have it already.
    """
    prompts = behaviour.count + neutral.count
    gap = behaviour.mean - neutral.mean
    every = behaviour.count * behaviour.covariance + neutral.count * neutral.covariance
    every = every / prompts
    every = every + (behaviour.count * neutral.count / prompts**2) * torch.outer(gap, gap)
    read = _solved(every, gap, 0.0, 0.0)
    return gap, read / (gap @ read).clamp_min(TINY)


@needs("residuals", turns=True)
def logistic_probe(behaviour: Sample, neutral: Sample, l2: float = 1.0) -> StreamVectors:
    """Weights of a logistic regression that tells the sets apart.

    Alain and Bengio 2016, arXiv 1610.01644. Newton's method on the convex loss, so that the result
    depends on nothing but the data. Both sets count the same, whatever their sizes.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        l2: Penalty on the squared weights, in units of the mean variance within the sets. Less
            lets single prompts decide; much more gives the difference of means.

    Raises:
        ValueError: the penalty is not above 0: of sets that can be told apart the weights would
            be infinite.
    """
    weights = _probe(behaviour.values.double(), neutral.values.double(), l2, behaviour.width)
    return aligned(weights[None], behaviour, neutral)


@needs("residuals", turns=True)
def inlp(behaviour: Sample, neutral: Sample, rank: int = 3, l2: float = 1.0) -> StreamVectors:
    """Probe after probe, each on what the ones before it leave: orthogonal directions.

    Iterative null-space projection: Ravfogel et al. 2020, arXiv 2004.07667.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        rank: How many probes.
        l2: As for `logistic_probe`.

    Raises:
        ValueError: fewer than one probe, or a penalty that is not above 0.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank} must be 1 or more")
    one, other = behaviour.values.double(), neutral.values.double()
    rows: list[StreamVector] = []
    for _ in range(rank):
        weights = _probe(one, other, l2, behaviour.width)
        for row in rows:  # rounding
            weights = weights - (weights @ row) * row
        if rows and weights.norm() <= CUT:
            break
        unit = weights / weights.norm().clamp_min(TINY)
        rows.append(unit)
        one, other = (values - torch.outer(values @ unit, unit) for values in (one, other))
    return aligned(torch.stack(rows), behaviour, neutral)


def _solved(
    covariance: Float[Tensor, "span span"], gap: StreamVector, share: float, level: float
) -> StreamVector:
    """((1 − share) covariance + share level 1)⁺ gap."""
    values, vectors = torch.linalg.eigh(covariance)
    shrunk = (1 - share) * values + share * level
    kept = shrunk > (TINY if share else CUT * shrunk[-1].clamp_min(TINY))
    if not kept.any():  # prompts of a set don't differ at all
        return gap
    inverse = torch.where(kept, 1 / torch.where(kept, shrunk, 1.0), 0.0)
    found: StreamVector = vectors @ (inverse * (vectors.T @ gap))
    return found


def _probe(
    one: Float[Tensor, "prompt span"], other: Float[Tensor, "prompt2 span"], l2: float, width: int
) -> StreamVector:
    """Weights w that minimise mean log(1 + exp(−±(w·x + c))) + ½ l2 ‖w‖², unit within variance."""
    if l2 <= 0:
        raise ValueError(f"l2 = {l2} must be above 0")
    within = 0.5 * (one.var(dim=0, unbiased=False).sum() + other.var(dim=0, unbiased=False).sum())
    scale = (within / width).sqrt()
    middle = 0.5 * (one.mean(dim=0) + other.mean(dim=0))
    if scale == 0:
        return one.mean(dim=0) - other.mean(dim=0)
    x = (torch.cat([one, other]) - middle) / scale
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)  # the last is the intercept
    sign = torch.cat([torch.ones(len(one)), -torch.ones(len(other))]).double()
    share = torch.cat(
        [torch.full((len(s),), 0.5 / len(s), dtype=torch.float64) for s in (one, other)]
    )
    penalty = torch.full((x.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 0.0

    def loss(w: Tensor) -> Tensor:
        miss = torch.nn.functional.softplus(-sign * (x @ w))
        return share @ miss + 0.5 * (penalty * w * w).sum()

    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        miss = torch.sigmoid(-sign * (x @ w))
        gradient = penalty * w - x.T @ (share * sign * miss)
        if gradient.norm() <= 1e-13:
            break
        curve = (share * miss * (1 - miss)).clamp_min(1e-14)
        hessian = (x * curve[:, None]).T @ x + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
        if size * step.norm() <= 1e-13 * w.norm().clamp_min(1.0):
            break
    return w[:-1] / scale
