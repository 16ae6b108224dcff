"""A replica whose model belongs to no run: it runs suites and reads texts, and is never edited."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ray_abliterate.evaluation.streaming import ChunkResult
from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextReader, TextRequest
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.model.architecture import hidden_size
from ray_abliterate.model.fingerprint import weights_fingerprint
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.quantization import bytes_of
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.replica.messages import ModelFacts, TrialSetup, UneditedReplicaApi
from ray_abliterate.search.plan import ModelShape, Plan


class UneditedReplica:
    """One model, as it was loaded. It implements `UneditedReplicaApi`."""

    def __init__(
        self, settings: ModelSettings, source: str, threads: int = 0, store: Any = None
    ) -> None:
        """Load the model.

        Args:
            settings: How the model is loaded.
            source: Local folder or Hub name.
            threads: CPU threads; 0 leaves torch's own choice.
            store: What replicas of a node share; ignored, since no weights are copied.
        """
        if threads:
            torch.set_num_threads(threads)
        self._model = LanguageModel.load(source, settings)
        self._reader = TextReader(self._model)

    def describe(self) -> ModelFacts:
        """Return the model's sizes and fingerprint; nothing is known of writers."""
        module = self._model.module
        return ModelFacts(
            shape=ModelShape(len(self._model.blocks), hidden_size(module), ()),
            writers=0,
            parameters=module.num_parameters(),
            model_bytes=sum(map(bytes_of, module.parameters())),
            cache_bytes=0,
            dtype=str(module.dtype).removeprefix("torch."),
            device=str(self._model.device),
            model_type=module.config.model_type,
            revision=getattr(module.config, "_commit_hash", None),
            fingerprint=weights_fingerprint(module, "state"),
        )

    def measure(
        self, suite: Suite, chunk: Chunk, plan: Plan, setup: TrialSetup | None
    ) -> SuiteChunk:
        """Run one chunk of a suite; plan and setup are ignored."""
        with self._model.without_storing():
            return run_chunk(suite, self._model, chunk)

    def plan_reading(self, request: TextRequest, count: bool) -> ReadPlan:
        """Decide how a long text is read; see `TextReader.plan_reading`."""
        return self._reader.plan_reading(request, count)

    def read(
        self,
        reading: ReadPlan,
        first: int,
        count: int | None,
        files: ReadFiles | None,
        plan: Plan,
        setup: TrialSetup | None,
    ) -> Iterator[ChunkResult]:
        """Read a stretch of a long text; plan and setup are ignored."""
        yield from self._reader.read(reading, first, count, files)


if TYPE_CHECKING:

    def _implements(replica: UneditedReplica) -> UneditedReplicaApi:
        return replica
