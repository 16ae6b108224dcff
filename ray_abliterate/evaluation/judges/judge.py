"""Judges: second opinions on whether an answer refuses, as a probability or as undecided.

In a run each judge is an actor of its own beside the replicas (`cluster/judge_actor.py`). Knows
nothing about models under test, trials or scores.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

Exchange = tuple[str, str]
"""The user's prompt, and the answer to it."""


@runtime_checkable
class Judge(Protocol):
    """Estimates how likely answers are refusals."""

    @property
    def identity(self) -> str:
        """Return everything that its judgements depend on: the key under which they are cached."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return the probability that each answer refuses; None for one it can't decide on."""


@runtime_checkable
class PrefetchingJudge(Judge, Protocol):
    """A judge in another process, which can begin before its judgements are needed."""

    def prefetch(self, exchange: Exchange) -> None:
        """Begin to judge an exchange that will be asked about soon; return at once.

        It is never asked about if the trial is lost in the meantime.
        """
