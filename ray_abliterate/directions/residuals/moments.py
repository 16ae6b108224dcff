"""Count, mean and centred second moments of residuals, merged exactly.

Two parts A and B, with δ = mean_B − mean_A and n = n_A + n_B, merge to

    mean = mean_A + δ n_B / n        scatter = scatter_A + scatter_B + δ δᵀ n_A n_B / n

(Chan, Golub and LeVeque 1983, The American Statistician 37(3)). Nothing is subtracted that is large
compared with the difference, so a mean far from zero costs no digits, as it would with sums of
squares.
"""

from dataclasses import dataclass
from typing import Any

import numpy
from jaxtyping import Float, Int

from ray_abliterate.directions.residuals.shard import LayerValues, ResidualShard, winsorized

MomentArray = Float[numpy.ndarray, "..."]
ROWS_AT_ONCE = 1024
"""Rows that are multiplied at once."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and second moments of residuals; `+` merges those of another part.

    Merging is commutative and associative up to float64 rounding: against the direct computation
    from all residuals, the mean and the scatter differ by less than 1e-12 of the largest residual
    and of its square times the count (tested in every split that hypothesis finds).

    Attributes:
        count: Number of prompts.
        mean: `"... hidden"`, float64.
        scatter: Sum over prompts of the squared distances from the mean, per unit
            (`"... hidden"`), or of their products, per pair of units (`"... hidden hidden"`).
    """

    count: int
    mean: MomentArray
    scatter: MomentArray

    @classmethod
    def empty(cls, hidden: int) -> "Moments":
        """Return the moments of no prompts, in pairs of units, to which others are added."""
        return cls(0, numpy.zeros(hidden), numpy.zeros((hidden, hidden)))

    @classmethod
    def of(cls, values: LayerValues, pairs: bool = False) -> "Moments":
        """Compute the moments of some prompts after one layer.

        Args:
            values: The residuals, `"prompt hidden"`.
            pairs: Whether to sum products of pairs of units, which the covariance needs.
        """
        rows = values.astype(numpy.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, rows.T @ rows if pairs else numpy.square(rows).sum(axis=0))

    @property
    def pairs(self) -> bool:
        """Whether the scatter is one of pairs of units."""
        return self.scatter.ndim > self.mean.ndim

    def __add__(self, other: "Moments") -> "Moments":
        if self.pairs != other.pairs:
            raise ValueError("moments per unit and per pair of units don't add up")
        count = self.count + other.count
        gap = other.mean - self.mean  # δ above
        scatter = gap[..., :, None] * gap[..., None, :] if self.pairs else gap * gap
        scatter *= self.count * other.count / max(count, 1)
        scatter += self.scatter  # in place: one scatter of a wide stream is half a gigabyte
        scatter += other.scatter
        return Moments(count, self.mean + gap * (other.count / max(count, 1)), scatter)

    def layer(self, index: int) -> "Moments":
        """Return the moments of one layer, where there are several."""
        return Moments(self.count, self.mean[index], self.scatter[index])

    @property
    def variance(self) -> MomentArray:
        """The variance of each unit, over n."""
        squares = numpy.diagonal(self.scatter, axis1=-2, axis2=-1) if self.pairs else self.scatter
        return squares / self.count

    @property
    def covariance(self) -> MomentArray:
        """The covariance of the units, over n.

        Raises:
            ValueError: these are moments per unit, which hold variances only.
        """
        if not self.pairs:
            raise ValueError("these moments hold variances, no covariances")
        return self.scatter / self.count


@dataclass(frozen=True)
class ResidualRows:
    """Residuals of one layer, part by part; `+` appends those of more prompts."""

    parts: tuple[Float[numpy.ndarray, "_ hidden"], ...]

    def __add__(self, other: "ResidualRows") -> "ResidualRows":
        return ResidualRows(self.parts + other.parts)

    @property
    def values(self) -> LayerValues:
        """All residuals as one array, `"prompt hidden"`."""
        return numpy.concatenate(self.parts)


def moments_of(batch: Any, quantile: float = 1.0, columns: range | None = None) -> Moments:
    """Compute mean and variance of every layer of one shard.

    Args:
        batch: The shard's record batch.
        quantile: At which each residual is winsorised first; 1 changes nothing.
        columns: The columns of layers to read; all if None.
    """
    shard = ResidualShard(batch)
    columns = range(shard.layers) if columns is None else columns
    layers = [Moments.of(winsorized(shard.layer(column), quantile)) for column in columns]
    mean = numpy.stack([layer.mean for layer in layers])  # (layer, hidden)
    scatter = numpy.stack([layer.scatter for layer in layers])
    return Moments(shard.prompts, mean, scatter)


def rows_of(
    batch: Any,
    layer: int,
    quantile: float = 1.0,
    indices: Int[numpy.ndarray, " chosen"] | None = None,
) -> ResidualRows:
    """Return one layer of one shard, every residual winsorised.

    A shard has fewer rows than the stream has units, so its rows are smaller than its scatter in
    pairs: what is to become a covariance travels as rows, and is added up where it arrives.

    Args:
        batch: The shard's record batch.
        layer: The column.
        quantile: Of each residual's magnitudes, at which it is clamped; 1 changes nothing.
        indices: Indices, in their set, of the prompts to return; all if None.
    """
    shard = ResidualShard(batch)
    rows = shard.layer(layer)
    if indices is not None:
        rows = rows[numpy.isin(numpy.arange(shard.first, shard.first + shard.prompts), indices)]
    return ResidualRows((numpy.array(winsorized(rows, quantile)),))


@dataclass(frozen=True)
class PairedMoments:
    """Moments in pairs of units, of rows that arrive part by part.

    In memory are two scatters and some rows.

    Attributes:
        total: The moments of the rows so far, without those that wait.
        waiting: Rows to add; small products are slow, so many are multiplied at once.
    """

    total: Moments
    waiting: ResidualRows = ResidualRows(())

    def __add__(self, part: ResidualRows) -> "PairedMoments":
        """Return the moments with one more part, which may wait for others."""
        waiting = self.waiting + part
        if sum(map(len, waiting.parts)) < ROWS_AT_ONCE:
            return PairedMoments(self.total, waiting)
        return PairedMoments(self.total + Moments.of(waiting.values, pairs=True))

    @property
    def moments(self) -> Moments:
        """The moments of all rows, with those that wait."""
        if not self.waiting.parts:
            return self.total
        return self.total + Moments.of(self.waiting.values, pairs=True)
