"""One line of what `doctor` prints: what was checked, what was found, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ray_abliterate.errors import RayAbliterateError

State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """Something that was checked.

    Attributes:
        name: What was checked.
        state: `FAIL` if a run cannot work so.
        finding: What was found, in a sentence or less.
        fix: What to do about it; shown unless the state is `ok`.
    """

    name: str
    state: State
    finding: str
    fix: str = ""


def attempt(name: str, look: Callable[[], str]) -> Check:
    """Return what `look` found, or its error as a failed check."""
    try:
        return Check(name, "ok", look())
    except RayAbliterateError as error:
        return failed_check(name, error)


def failed_check(name: str, error: RayAbliterateError) -> Check:
    """Return an error of ours as a check: its first line is what was found, the others the fix."""
    kind, _, subject = name.partition(" ")
    finding, _, fix = str(error).removeprefix(f"{kind} {subject!r}: ").partition("\n")
    return Check(name, "FAIL", finding, fix.strip())
