"""Where second moments are computed: as covariances, or in the subspace that residuals span.

A covariance is hidden × hidden, whatever the number of prompts. Where there are fewer prompts than
units, the residuals lie in a subspace of as many dimensions as there are prompts, so that their
coordinates there say the same and are smaller: n × n instead of hidden × hidden. Both are exact.
"""

from dataclasses import dataclass
from typing import Literal

FLOAT64 = 8
WARN_BYTES = 16 * 2**30
"""Memory above which the reason adds that nothing smaller is exact."""


@dataclass(frozen=True)
class Subspace:
    """The space in which one layer's second moments are computed.

    Attributes:
        kind: `covariance` (hidden × hidden), or `samples` (coordinates in the residuals' span).
        bytes: Approximate memory for one layer of both sets.
        reason: Why, in words for people.
    """

    kind: Literal["covariance", "samples"]
    bytes: int
    reason: str


def choose_subspace(prompts: int, hidden: int) -> Subspace:
    """Return the smaller of the two, for one layer at a time.

    Args:
        prompts: Prompts of both sets together.
        hidden: Width of the residual stream.
    """
    covariance = FLOAT64 * 4 * hidden**2  # two scatters, one part's and the sum
    # the residuals in both widths, a basis, coordinates, and their products
    samples = prompts * hidden * (FLOAT64 + FLOAT64 // 2) + FLOAT64 * 4 * prompts**2
    if prompts < hidden:
        return Subspace(
            "samples",
            samples,
            f"layer by layer in the span of the residuals ({prompts} prompts are fewer than "
            f"{hidden} units), {_size(samples)} at a time{_warning(samples)}",
        )
    return Subspace(
        "covariance",
        covariance,
        f"layer by layer as covariances of {hidden} units ({prompts} prompts are no fewer), "
        f"{_size(covariance)} at a time{_warning(covariance)}",
    )


def _size(amount: int) -> str:
    return f"{amount / 1e9:.2g} GB" if amount >= 1e8 else f"{amount / 1e6:.2g} MB"


def _warning(amount: int) -> str:
    return "; nothing smaller is exact" if amount > WARN_BYTES else ""
