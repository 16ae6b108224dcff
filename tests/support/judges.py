"""Judges for tests, with opinions that are given."""

from collections.abc import Sequence

from ray_abliterate.evaluation.judges.judge import Exchange


class StubJudge:
    """A judge with a given opinion on each answer."""

    def __init__(self, opinions: dict[str, float | None], identity: str = "one") -> None:
        self.opinions, self.identity = opinions, identity
        self.asked: list[str] = []

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return the opinions, and record what was asked."""
        self.asked += [answer for _, answer in exchanges]
        return [self.opinions[answer] for _, answer in exchanges]


class StubPrefetchingJudge(StubJudge):
    """A judge in another process, with the same opinion on every answer."""

    def __init__(self, opinion: float) -> None:
        super().__init__({})
        self.opinion = opinion
        self.expected: list[tuple[str, int]] = []
        self.written = lambda: 0

    def prefetch(self, exchange: Exchange) -> None:
        """Record the answer, and how much was written when it came."""
        self.expected.append((exchange[1], self.written()))

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return the one opinion on each answer."""
        return [self.opinion] * len(exchanges)
