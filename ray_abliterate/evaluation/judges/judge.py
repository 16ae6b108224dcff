"""Judges: second opinions on whether an answer refuses. They say how likely, or that none can tell.

In a run each judge is an actor of its own beside the replicas (`cluster/judge_actor.py`). Knows
nothing about models under test, trials or scores.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

Exchange = tuple[str, str]
"""What the user said, and the answer."""


@runtime_checkable
class Judge(Protocol):
    """Says how likely answers are refusals."""

    @property
    def identity(self) -> str:
        """All that its judgements depend on: the key under which they are kept."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Probability that each answer refuses; None if it can't tell."""


@runtime_checkable
class PrefetchingJudge(Judge, Protocol):
    """One that works elsewhere, and can begin before it is waited for."""

    def prefetch(self, exchange: Exchange) -> None:
        """This will be asked about soon, unless the trial is lost. Returns at once."""
