"""What a fault cost, and the checks that every scenario makes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE_SECONDS = 400.0
"""Time after which what must come true counts as failed."""


@dataclass(frozen=True)
class Outcome:
    """What a fault cost.

    Attributes:
        finished_before: Trials that had finished when it happened.
        lost: How many of these were missing at the end: always 0, or the scenario raises.
        again: Trials that were evaluated more than once.
        failed: Trials that ended with an error.
        recovery_seconds: Time from the fault to the next finished trial.
        seen: What the user reads.
    """

    finished_before: int
    lost: int
    again: int
    failed: int
    recovery_seconds: float
    seen: tuple[str, ...]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come true.

    Raises:
        AssertionError: It did not in `PATIENCE_SECONDS`.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        check(time.monotonic() < deadline, "it did not happen in time")
        time.sleep(0.02)


def check(holds: bool, text: str) -> None:
    """Raise an error with this text if something does not hold.

    Raises:
        AssertionError: It does not.
    """
    if not holds:
        raise AssertionError(text)
