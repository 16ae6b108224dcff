"""A model as it is, of no run: it is measured, and reads texts. Nothing of it is edited."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ray_abliterate.evaluation.streaming import ChunkResult
from ray_abliterate.evaluation.streaming.reader import Keeping, Reader, Reading, Route
from ray_abliterate.evaluation.streaming.saved_state import fingerprint
from ray_abliterate.evaluation.suites.build import measure
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.quantization import bytes_of
from ray_abliterate.recipe import ModelSettings


@dataclass(frozen=True)
class BareFacts:
    """What is known of the model."""

    model_bytes: int
    fingerprint: str
    dtype: str
    parameters: int


class BareReplica:
    """One model. Where replicas of a run are handed a plan and a setup, it takes none."""

    def __init__(
        self, settings: ModelSettings, source: str, threads: int = 0, store: Any = None
    ) -> None:
        """Load the model.

        Args:
            settings: How it is held.
            source: Local folder or Hub name.
            threads: CPU threads; 0 leaves torch's own choice.
            store: Not needed: nothing is copied.
        """
        if threads:
            torch.set_num_threads(threads)
        self._model = LanguageModel.load(source, settings)
        self._reader = Reader(self._model)

    def describe(self) -> BareFacts:
        """Sizes, and what tells it from other models."""
        module = self._model.module
        return BareFacts(
            sum(map(bytes_of, module.parameters())),
            fingerprint(module),
            str(module.dtype).removeprefix("torch."),
            module.num_parameters(),
        )

    def measure(
        self, suite: Suite, chunk: Chunk, plan: Any = None, setup: Any = None
    ) -> SuiteChunk:
        """One chunk of a suite."""
        with self._model.passing():
            return measure(suite, self._model, chunk)

    def route(self, reading: Reading, count: bool) -> Route:
        """How a long text is read, see `Reader.route`."""
        return self._reader.route(reading, count)

    def read(
        self,
        route: Route,
        first: int,
        count: int | None,
        keeping: Keeping | None,
        plan: Any = None,
        setup: Any = None,
    ) -> Iterator[ChunkResult]:
        """A stretch of a long text, see `Reader.read`."""
        yield from self._reader.read(route, first, count, keeping)
