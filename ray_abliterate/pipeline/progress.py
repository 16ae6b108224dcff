"""What a run reports while it works. Knows nothing about terminals."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from ray_abliterate.pipeline.suite_results import Finding
from ray_abliterate.search.frontier import Frontier, Trial


@runtime_checkable
class Progress(Protocol):
    """A display that follows a run; every method returns at once."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return a context that shows a stage, which may take a while, until the block ends."""

    def step(self, done: int, total: int) -> None:
        """Show how much of the current stage is done."""

    def note(self, text: str) -> None:
        """Show a line that is worth knowing."""

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Show a trial that has ended.

        Args:
            trial: Finished or failed.
            done: Trials that have ended, this one included.
            total: Trials that the run is to have.
            frontier: Of all trials that have ended.
        """

    def finding(self, model: str, suite: str, finding: Finding, ended: bool) -> None:
        """Show what a suite says of a model so far.

        Args:
            model: Label of the model, `base` or `trial-17`.
            suite: Name of the suite.
            finding: Its main score, and the difference from the base model.
            ended: Whether the suite is done with this model.
        """


class SilentProgress:
    """A `Progress` that shows nothing; a display of a few things derives from it."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return a context that shows nothing."""
        return nullcontext()

    def step(self, done: int, total: int) -> None:
        """Ignore how much is done."""

    def note(self, text: str) -> None:
        """Ignore a line of text."""

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Ignore that a trial ended."""

    def finding(self, model: str, suite: str, finding: Finding, ended: bool) -> None:
        """Ignore what a suite says."""
