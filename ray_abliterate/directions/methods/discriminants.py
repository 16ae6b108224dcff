"""Directions that separate the sets: discriminant analysis, probes, and what LEACE reads."""

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
"""Most steps of Newton's method; about ten are usual."""
ROUNDING = 1e-10
"""Without shrinkage, eigenvalues below this share of the largest are rounding."""


@needs("covariances", equivariant=True)
def whitened(
    behaviour: Covariances, neutral: Covariances, shrinkage: float | None = None
) -> StreamVectors:
    """Return Fisher's linear discriminant Σ⁻¹δ, with Σ the shrunk covariance within the sets.

    Fisher 1936; Σ = (1 − ρ) S + ρ (tr S / hidden) 1, and ρ by the oracle approximating shrinkage
    of Chen et al. 2010, IEEE Transactions on Signal Processing 58(10), which needs S alone (Ledoit
    and Wolf's needs every residual).

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        shrinkage: ρ, above 0 and up to 1 (the difference of means); computed if None. Near 0, where
            prompts are fewer than units, only units that vary in neither set count.

    Raises:
        ValueError: ρ is not above 0 and at most 1.
    """
    if shrinkage is not None and not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage = {shrinkage} must be above 0 and at most 1")
    prompts, width = behaviour.count + neutral.count, neutral.width
    within = behaviour.count * behaviour.covariance + neutral.count * neutral.covariance
    within = within / prompts
    rho = oracle_shrinkage(within, prompts, width) if shrinkage is None else shrinkage
    level = float(within.trace()) / width  # the mean variance of a unit
    vector = _solve_shrunk(within, behaviour.mean - neutral.mean, rho, level)
    return aligned(vector[None], behaviour, neutral)


def oracle_shrinkage(covariance: Float[Tensor, "span span"], prompts: int, width: int) -> float:
    """Return ρ of Chen et al. 2010, equation 23.

    Args:
        covariance: The sample covariance S, possibly in the residuals' span.
        prompts: The number of prompts n.
        width: The number of units p, of the whole stream.
    """
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    denominator = (prompts + 1 - 2 / width) * (squares - trace * trace / width)
    if denominator <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / width) * squares + trace * trace) / denominator)


@needs("covariances", equivariant=True)
def leace(behaviour: Covariances, neutral: Covariances) -> StreamVectors:
    """Return the direction that LEACE reads the behaviour from: Σ⁺δ, with Σ the covariance of all.

    Belrose et al. 2023, arXiv 2306.03819, theorem 4.3. LEACE itself is oblique (`leace_eraser`):
    it reads along Σ⁺δ and subtracts along δ. An edit of weights here is orthogonal and does both
    along one direction; this is the one that is read, without shrinkage.
    """
    return aligned(leace_eraser(behaviour, neutral)[1][None], behaviour, neutral)


def leace_eraser(behaviour: Covariances, neutral: Covariances) -> tuple[StreamVector, StreamVector]:
    """Return LEACE for two sets in closed form: x ↦ x − w (rᵀ (x − mean)) defeats linear probes.

    Returns:
        w = δ, and r = Σ⁺δ / (δᵀΣ⁺δ), so that both sets have the same mean afterwards; zeros where
        they have it already.
    """
    prompts = behaviour.count + neutral.count
    gap = behaviour.mean - neutral.mean
    covariance = behaviour.count * behaviour.covariance + neutral.count * neutral.covariance
    covariance = covariance / prompts
    # the covariance within the sets so far; the sets' means add that between them
    between = behaviour.count * neutral.count / prompts**2
    covariance = covariance + between * torch.outer(gap, gap)
    read = _solve_shrunk(covariance, gap, 0.0, 0.0)
    return gap, read / (gap @ read).clamp_min(TINY)


@needs("residuals", equivariant=True)
def logistic_probe(behaviour: Sample, neutral: Sample, l2: float = 1.0) -> StreamVectors:
    """Return the weights of a logistic regression that separates the sets.

    Alain and Bengio 2016, arXiv 1610.01644. Newton's method on the convex loss, so that the result
    depends on nothing but the data. Both sets have equal weight, whatever their sizes.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        l2: Penalty on the squared weights, in units of the mean variance within the sets. A small
            one lets single prompts decide; a large one gives the difference of means.

    Raises:
        ValueError: the penalty is not above 0: the weights of sets that can be separated would be
            infinite.
    """
    weights = _fit_probe(behaviour.values.double(), neutral.values.double(), l2, behaviour.width)
    return aligned(weights[None], behaviour, neutral)


@needs("residuals", equivariant=True)
def inlp(behaviour: Sample, neutral: Sample, rank: int = 3, l2: float = 1.0) -> StreamVectors:
    """Fit probe after probe, each on what the ones before it leave; return orthogonal directions.

    Iterative null-space projection: Ravfogel et al. 2020, arXiv 2004.07667.

    Args:
        behaviour: Prompts that show the behaviour.
        neutral: Prompts that don't.
        rank: The number of probes.
        l2: As for `logistic_probe`.

    Raises:
        ValueError: fewer than one probe, or a penalty that is not above 0.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank} must be 1 or more")
    one, other = behaviour.values.double(), neutral.values.double()
    rows: list[StreamVector] = []
    for _ in range(rank):
        weights = _fit_probe(one, other, l2, behaviour.width)
        for row in rows:  # takes out rounding
            weights = weights - (weights @ row) * row
        if rows and weights.norm() <= ROUNDING:
            break
        unit = weights / weights.norm().clamp_min(TINY)
        rows.append(unit)
        one, other = (values - torch.outer(values @ unit, unit) for values in (one, other))
    return aligned(torch.stack(rows), behaviour, neutral)


def _solve_shrunk(
    covariance: Float[Tensor, "span span"], gap: StreamVector, rho: float, level: float
) -> StreamVector:
    """Return ((1 − rho) covariance + rho level 1)⁺ gap."""
    values, vectors = torch.linalg.eigh(covariance)  # (span), (span, span) by columns
    shrunk = (1 - rho) * values + rho * level
    in_range = shrunk > (TINY if rho else ROUNDING * shrunk[-1].clamp_min(TINY))
    if not in_range.any():  # prompts of a set don't differ at all
        return gap
    inverse = torch.where(in_range, 1 / torch.where(in_range, shrunk, 1.0), 0.0)
    solution: StreamVector = vectors @ (inverse * (vectors.T @ gap))
    return solution


def _fit_probe(
    one: Float[Tensor, "prompt span"], other: Float[Tensor, "prompt2 span"], l2: float, width: int
) -> StreamVector:
    """Return the w that minimises mean log(1 + exp(−±(w·x + c))) + ½ l2 ‖w‖².

    The minimum is that of residuals scaled to unit mean variance within the sets.
    """
    if l2 <= 0:
        raise ValueError(f"l2 = {l2} must be above 0")
    within = 0.5 * (one.var(dim=0, unbiased=False).sum() + other.var(dim=0, unbiased=False).sum())
    scale = (within / width).sqrt()
    midpoint = 0.5 * (one.mean(dim=0) + other.mean(dim=0))
    if scale == 0:
        return one.mean(dim=0) - other.mean(dim=0)
    x = (torch.cat([one, other]) - midpoint) / scale  # (prompts of both sets, span)
    x = torch.cat(
        [x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1
    )  # the last column is the intercept
    sign = torch.cat([torch.ones(len(one)), -torch.ones(len(other))]).double()
    # half of the weight for each set
    share = torch.cat(
        [torch.full((len(s),), 0.5 / len(s), dtype=torch.float64) for s in (one, other)]
    )
    penalty = torch.full((x.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 0.0

    def loss(w: Tensor) -> Tensor:
        losses = torch.nn.functional.softplus(-sign * (x @ w))
        return share @ losses + 0.5 * (penalty * w * w).sum()

    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        error = torch.sigmoid(-sign * (x @ w))  # probability of the wrong set, (prompt)
        gradient = penalty * w - x.T @ (share * sign * error)
        if gradient.norm() <= 1e-13:
            break
        curvature = (share * error * (1 - error)).clamp_min(1e-14)
        hessian = (x * curvature[:, None]).T @ x + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0  # halved until the loss falls
        while size > 1e-6 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
        if size * step.norm() <= 1e-13 * w.norm().clamp_min(1.0):
            break
    return w[:-1] / scale
