"""Where second moments are kept: as a covariance, or as the residuals themselves.

A covariance is hidden × hidden, whatever the number of prompts. Where there are fewer prompts than
units, the residuals lie in a subspace of as many dimensions as there are prompts, so that their
coordinates there say the same and are smaller: n × n instead of hidden × hidden. Both are exact.
"""

from dataclasses import dataclass
from typing import Literal

FLOAT64 = 8
WARN_BYTES = 16 * 2**30
"""Above this, the reason says that it is a lot."""


@dataclass(frozen=True)
class Subspace:
    """Where one layer's second moments are kept.

    Attributes:
        kind: `covariance` (hidden × hidden), or `samples` (coordinates in the residuals' span).
        bytes: Memory for one layer of both sets, about.
        reason: Why, in words.
    """

    kind: Literal["covariance", "samples"]
    bytes: int
    reason: str


def choose_subspace(prompts: int, hidden: int) -> Subspace:
    """The smaller of the two, for one layer at a time.

    Args:
        prompts: Of both sets together.
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
            f"{hidden} units), {_size(samples)} at a time{_much(samples)}",
        )
    return Subspace(
        "covariance",
        covariance,
        f"layer by layer as covariances of {hidden} units ({prompts} prompts are no fewer), "
        f"{_size(covariance)} at a time{_much(covariance)}",
    )


def _size(amount: int) -> str:
    return f"{amount / 1e9:.2g} GB" if amount >= 1e8 else f"{amount / 1e6:.2g} MB"


def _much(amount: int) -> str:
    return "; nothing smaller is exact" if amount > WARN_BYTES else ""
