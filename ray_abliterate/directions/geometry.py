"""The geometry of two sets of residuals after one block: coordinates on planes, and a few numbers.

Everything is computed from the matrix of inner products of all prompts (prompts × prompts), so the
width of the stream costs one product, and nothing wider than one block's residuals is in memory.
Knows nothing about models or figures.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy
from jaxtyping import Float

from ray_abliterate.directions.separability import silhouette_of

Plane = Float[numpy.ndarray, "prompt 2"]


@dataclass(frozen=True)
class SetGeometry:
    """How two sets lie in the residual stream, in its own units.

    Attributes:
        behaviour_norm: Mean length of the behaviour's residuals.
        neutral_norm: Mean length of the neutral residuals.
        gap: Distance between the two means.
        cosine: Cosine of the two means.
        spread: Root mean square distance of residuals from their own set's mean.
        silhouette: How much nearer residuals are to their own set, in all dimensions: -1 to 1.
        dimensions: Effective number of dimensions that residuals vary in (participation ratio of
            the principal components' variances).
    """

    behaviour_norm: float
    neutral_norm: float
    gap: float
    cosine: float
    spread: float
    silhouette: float
    dimensions: float


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of both sets' residuals after one block.

    Attributes:
        products: Inner products of all prompts about the midpoint of the two sets' means, float64;
            the behaviour's come first.
        first: The number of the behaviour's prompts.
        norms: Lengths of all residuals.
        means: Lengths of the two sets' means, and their inner product.
    """

    products: Float[numpy.ndarray, "prompt prompt"]
    first: int
    norms: Float[numpy.ndarray, " prompt"]
    means: tuple[float, float, float]

    @classmethod
    def of(
        cls,
        behaviour: Float[numpy.ndarray, "prompt hidden"],
        neutral: Float[numpy.ndarray, "other hidden"],
    ) -> "InnerProducts":
        """Compute the products in float64, since massive activations hide what is small."""
        rows = numpy.concatenate([behaviour, neutral]).astype(numpy.float64)
        norms = numpy.sqrt(numpy.einsum("ph,ph->p", rows, rows))
        one, other = (
            part.mean(axis=0) for part in (rows[: len(behaviour)], rows[len(behaviour) :])
        )
        means = float(one @ one) ** 0.5, float(other @ other) ** 0.5, float(one @ other)
        rows -= 0.5 * (one + other)
        return cls(rows @ rows.T, len(behaviour), norms, means)

    @cached_property
    def _weights(self) -> Float[numpy.ndarray, " prompt"]:
        """Weights of the prompts whose sum is the difference of means."""
        other = len(self.products) - self.first
        signs = [numpy.full(self.first, 1 / self.first), numpy.full(other, -1 / other)]
        return numpy.concatenate(signs)

    @property
    def gap(self) -> float:
        """The distance between the two means."""
        return math.sqrt(max(0.0, float(self._weights @ self.products @ self._weights)))

    def geometry(self) -> SetGeometry:
        """Return lengths, angles and distances in units of the residual stream."""
        behaviour, neutral = numpy.split(self.norms, [self.first])
        squares = numpy.diagonal(self.products)  # squared distances from the midpoint
        distances = squares[:, None] + squares[None] - 2 * self.products
        distances = numpy.sqrt(numpy.maximum(distances, 0.0, out=distances), out=distances)
        numpy.fill_diagonal(distances, 0.0)
        within = max(0.0, float(numpy.mean([s.mean() for s in numpy.split(squares, [self.first])])))
        # the midpoint is half the gap away from each mean
        spread = max(0.0, within - self.gap**2 / 4) ** 0.5
        one, other, product = self.means
        total, energy = float(squares.sum()), float(numpy.square(self.products).sum())
        return SetGeometry(
            behaviour_norm=float(behaviour.mean()),
            neutral_norm=float(neutral.mean()),
            gap=self.gap,
            cosine=product / (one * other) if one * other > 0 else 0.0,
            spread=spread,
            silhouette=silhouette_of(distances, self.first),
            dimensions=total * total / energy if energy > 0 else 0.0,
        )

    def principal_plane(self) -> tuple[Plane, tuple[float, float]]:
        """Return coordinates along the two leading principal components, and their variance shares.

        Pearson 1901. The behaviour has the larger coordinates along the first component; the sign
        of the second is arbitrary.
        """
        leading, values = _leading_components(self.products, 2)
        total = float(numpy.trace(self.products))
        shares = [float(value) / total if total > 0 else 0.0 for value in values]
        leading[:, 0] *= -1.0 if self._weights @ leading[:, 0] < 0 else 1.0
        return leading, (shares[0], shares[1])

    def mean_difference_plane(self) -> tuple[Plane, tuple[float, float]]:
        """Return coordinates along the difference of means and the leading component of the rest.

        With their shares of variance. Coordinates are zeros along a difference of zero.
        """
        gap = self.gap
        along = self.products @ self._weights / gap if gap > 0 else numpy.zeros(len(self.products))
        rest = self.products - numpy.outer(along, along)  # products across the difference
        leading, values = _leading_components(rest, 1)
        total = float(numpy.trace(self.products))
        shares = (float(along @ along) / total, float(values[0]) / total) if total else (0.0, 0.0)
        return numpy.stack([along, leading[:, 0]], axis=1), shares


def keep_orientation(plane: Plane, before: Plane | None) -> Plane:
    """Give a plane's second axis the sign that it has in the block before, if there is one.

    Signs of components are arbitrary; a picture that steps through layers should not flip.
    """
    if before is None or plane[:, 1] @ before[:, 1] >= 0:
        return plane
    flipped: Plane = plane * numpy.array([1.0, -1.0])
    return flipped


def _leading_components(
    products: Float[numpy.ndarray, "prompt prompt"], count: int
) -> tuple[Float[numpy.ndarray, "prompt count"], Float[numpy.ndarray, " count"]]:
    """Return coordinates along the components of most variance, and their variance × prompts."""
    from scipy.linalg import eigh

    size = len(products)
    values, vectors = eigh(products, subset_by_index=[max(0, size - count), size - 1])
    values = numpy.maximum(values[::-1], 0.0)  # largest first
    coordinates = vectors[:, ::-1] * numpy.sqrt(values)
    return coordinates, values
