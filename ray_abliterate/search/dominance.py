"""The dominance stop: a trial ends as soon as a finished trial is better whatever comes.

Pure values; knows nothing about scorers, weights, processes or the sampler.

Stopping never changes a frontier. A threshold is the losses of a finished trial M; a trial T is
pruned when M dominates lower bounds of T's losses: at least as good everywhere, and better
somewhere. T's own losses are no smaller than their bounds, so M dominates T itself, and T is not on
the frontier, whichever of the two has the lower number and whichever ended first. Merely equal
losses prune nothing: of equal trials the frontier keeps the lowest number, and that may be the one
that is still in flight. Pruned trials set no thresholds: their losses are not known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_abliterate.search.frontier import Frontier, Trial, dominates


@dataclass(frozen=True)
class ThresholdSet:
    """The thresholds that a running trial must beat, none of which dominates another.

    Attributes:
        losses: The losses of finished trials, one tuple each, in the order of the objectives.
    """

    losses: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> "ThresholdSet":
        """Return the thresholds that the finished trials set; pruned trials set none."""
        return cls(tuple(member.losses for member in Frontier.of(trials).members))

    def including(self, trial: tuple[float, ...]) -> "ThresholdSet":
        """Return the set with one more finished trial's losses, without what those dominate."""
        if trial in self.losses or self.beats(trial):
            return self
        return ThresholdSet((*(old for old in self.losses if not dominates(trial, old)), trial))

    def beats(self, bounds: Sequence[float]) -> bool:
        """Return whether a finished trial dominates every trial with losses of `bounds` or more."""
        return any(dominates(threshold, bounds) for threshold in self.losses)
