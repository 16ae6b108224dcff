"""Count, mean and centred second moments of residuals, merged exactly.

Two parts A and B, with δ = mean_B − mean_A and n = n_A + n_B, are together

    mean = mean_A + δ n_B / n        scatter = scatter_A + scatter_B + δ δᵀ n_A n_B / n

(Chan, Golub and LeVeque 1983, The American Statistician 37(3)). Nothing is subtracted that is large
beside what remains, so a mean far from zero costs no digits, as it would with sums of squares.
"""

from dataclasses import dataclass
from typing import Any

import numpy
from jaxtyping import Float, Int

from ray_abliterate.directions.residuals.shard import LayerValues, ResidualShard, winsorized

MomentArray = Float[numpy.ndarray, "..."]
TAKEN_AT_ONCE = 1024
"""Rows that are multiplied in one go."""


@dataclass(frozen=True)
class Moments:
    """What is known of a set of residuals without the residuals; of more of them by `+`.

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
    def nothing(cls, hidden: int) -> "Moments":
        """Of no prompt, in pairs: what others are added to."""
        return cls(0, numpy.zeros(hidden), numpy.zeros((hidden, hidden)))

    @classmethod
    def of(cls, values: LayerValues, pairs: bool = False) -> "Moments":
        """Of some prompts after one layer, `"prompt hidden"`.

        Args:
            values: The residuals.
            pairs: Products of pairs of units, which the covariance is made of.
        """
        rows = values.astype(numpy.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, rows.T @ rows if pairs else numpy.square(rows).sum(axis=0))

    @property
    def pairs(self) -> bool:
        """Whether the scatter is of pairs of units."""
        return self.scatter.ndim > self.mean.ndim

    def __add__(self, other: "Moments") -> "Moments":
        if self.pairs != other.pairs:
            raise ValueError("moments per unit and per pair of units don't add up")
        count = self.count + other.count
        gap = other.mean - self.mean
        scatter = gap[..., :, None] * gap[..., None, :] if self.pairs else gap * gap
        scatter *= self.count * other.count / max(count, 1)
        scatter += self.scatter  # in place: of a wide stream, one scatter is half a gigabyte
        scatter += other.scatter
        return Moments(count, self.mean + gap * (other.count / max(count, 1)), scatter)

    def layer(self, index: int) -> "Moments":
        """Those of one layer, where there are several."""
        return Moments(self.count, self.mean[index], self.scatter[index])

    @property
    def variance(self) -> MomentArray:
        """Variance of each unit, over n."""
        squares = numpy.diagonal(self.scatter, axis1=-2, axis2=-1) if self.pairs else self.scatter
        return squares / self.count

    @property
    def covariance(self) -> MomentArray:
        """Covariance of the units, over n.

        Raises:
            ValueError: only variances were kept.
        """
        if not self.pairs:
            raise ValueError("these moments hold variances, no covariances")
        return self.scatter / self.count


@dataclass(frozen=True)
class ResidualRows:
    """Residuals of one layer as they are, part by part; of more prompts by `+`."""

    parts: tuple[Float[numpy.ndarray, "_ hidden"], ...]

    def __add__(self, other: "ResidualRows") -> "ResidualRows":
        return ResidualRows(self.parts + other.parts)

    @property
    def values(self) -> LayerValues:
        """All of them, `"prompt hidden"`."""
        return numpy.concatenate(self.parts)


def moments_of(batch: Any, quantile: float = 1.0, columns: range | None = None) -> Moments:
    """Mean and variance of every layer of one shard, every residual winsorised first; of some
    columns of layers, all if unset."""
    shard = ResidualShard(batch)
    wanted = range(shard.layers) if columns is None else columns
    found = [Moments.of(winsorized(shard.layer(i), quantile)) for i in wanted]
    mean, scatter = (numpy.stack([getattr(m, n) for m in found]) for n in ("mean", "scatter"))
    return Moments(shard.prompts, mean, scatter)


def rows_of(
    batch: Any,
    layer: int,
    quantile: float = 1.0,
    places: Int[numpy.ndarray, " chosen"] | None = None,
) -> ResidualRows:
    """One layer of one shard, every residual winsorised.

    A shard has fewer rows than the stream has units, so its rows are smaller than its scatter in
    pairs: what is to become a covariance travels as rows, and is added up where it arrives.

    Args:
        batch: The shard.
        layer: Its column.
        quantile: Of each residual's magnitudes; 1 clamps none.
        places: The prompts that are wanted, by their places in their set; all if unset.
    """
    shard = ResidualShard(batch)
    rows = shard.layer(layer)
    if places is not None:
        rows = rows[numpy.isin(numpy.arange(shard.first, shard.first + shard.prompts), places)]
    return ResidualRows((numpy.array(winsorized(rows, quantile)),))


@dataclass(frozen=True)
class PairedMoments:
    """Moments in pairs, of rows that come part by part; in memory are two scatters and some rows.

    Attributes:
        total: Of the rows so far, but those that wait.
        waiting: Rows; a product of few with few is dear, so they are taken many at a time.
    """

    total: Moments
    waiting: ResidualRows = ResidualRows(())

    def __add__(self, part: ResidualRows) -> "PairedMoments":
        """With one more part."""
        waiting = self.waiting + part
        if sum(map(len, waiting.parts)) < TAKEN_AT_ONCE:
            return PairedMoments(self.total, waiting)
        return PairedMoments(self.total + Moments.of(waiting.values, pairs=True))

    @property
    def moments(self) -> Moments:
        """Of all of them."""
        if not self.waiting.parts:
            return self.total
        return self.total + Moments.of(self.waiting.values, pairs=True)
