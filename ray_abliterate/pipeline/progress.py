"""What a run tells those who watch it. Knows nothing about terminals."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from ray_abliterate.pipeline.suite_results import Finding
from ray_abliterate.search.frontier import Frontier, Trial


@runtime_checkable
class Progress(Protocol):
    """Follows a run."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Something that may take a while has begun; it ends with the block."""

    def step(self, done: int, total: int) -> None:
        """So much of the current stage is done."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """A trial has ended."""

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """So much is known of a model, while the search goes on."""


class SilentProgress:
    """Nobody follows."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def step(self, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        """Nothing."""

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        """Nothing."""
