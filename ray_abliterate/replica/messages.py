"""What travels to and from a replica: the methods that can be called, and the values they take.

Imports no torch, so the driver and the pool's process can name these methods and hold these values
without loading a model library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Scorecard

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.directions.layer_selection import LayerScores
    from ray_abliterate.evaluation.streaming import ChunkResult
    from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextRequest
    from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
    from ray_abliterate.model.batch_size import Tuning
    from ray_abliterate.replica.profiling import TrialProfile
    from ray_abliterate.search.dominance import ThresholdSet


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a run share; it travels by reference, once to each node.

    Attributes:
        directions: The directions that plans edit along.
        response_prefix: Tokens that all answers begin with; what follows them is compared.
        tuning: How to compute; each replica makes its own choice if None.
    """

    directions: Directions
    response_prefix: tuple[int, ...] = ()
    tuning: Tuning | None = None

    @property
    def key(self) -> str:
        """SHA-256 of the content: the same setup has the same key in every process."""
        rest = repr((self.response_prefix, self.tuning)).encode()
        return hashlib.sha256(self.directions.bits() + rest).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of one plan returned.

    Attributes:
        scorecard: The scores, in the recipe's order of scorers.
        seconds: Time on the replica; a plan's share of it in shared passes.
        answers: Rows of prompt, answer and verdict, if the recipe records them.
        shared: Scored by virtual edits, in passes shared with other plans.
        tokens: Tokens of answers that were generated for it.
        replica: Label of the replica that evaluated it.
    """

    scorecard: Scorecard
    seconds: float
    answers: tuple[dict[str, Any], ...] = ()
    shared: bool = False
    tokens: int = 0
    replica: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """What a replica knows about its model.

    Attributes:
        shape: Blocks, residual width, components that have writers.
        writers: Parameters that write to the residual stream; 0 where nothing is edited.
        parameters: Number of parameters.
        model_bytes: Memory of the parameters.
        cache_bytes: Memory of the pristine copies of the writers.
        dtype: The dtype of the weights, such as `bfloat16`.
        device: Where it computes, for people.
        model_type: The configuration's model type.
        revision: The Hub's commit; None for a local folder.
        fingerprint: Of a sample of every parameter: tells whether the weights are the same.
        template: Fingerprint of chat template, its options and the tokenizer: what turns prompts
            into tokens.
        computes: Device, attention, and the other choices that decide how results are rounded.
        most_per_pass: Plans that can share a pass, by the kind of model and by memory.
        why_not_more: What stands against one more.
        quantization: How the weights are quantized; empty if they are not.
        offloaded: Where weights rest that the device has no room for; empty if it has.
        notes: What a user should know.
    """

    shape: ModelShape
    writers: int
    parameters: int
    model_bytes: int
    cache_bytes: int
    dtype: str
    device: str
    model_type: str
    revision: str | None
    fingerprint: str = ""
    template: str = ""
    computes: str = ""
    most_per_pass: int = 1
    why_not_more: str = ""
    quantization: str = ""
    offloaded: str = ""
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class EffectPrompts:
    """What the effect of a direction is measured on; the same for all layers of a run.

    Attributes:
        behaviour: Held-out prompts that show the behaviour.
        neutral: Held-out prompts that don't.
        openings: How refusals begin.
    """

    behaviour: tuple[Prompt, ...]
    neutral: tuple[Prompt, ...]
    openings: tuple[str, ...]


class UneditedReplicaApi(Protocol):
    """What any replica can be asked, also one of a model that belongs to no run.

    A replica of a run is asked with a plan and the run's setup; one whose model is never edited
    is asked with the empty plan and None.
    """

    def describe(self) -> ModelFacts:
        """Return the model's shape, sizes and fingerprint, and how it computes."""
        ...

    def measure(
        self, suite: Suite, chunk: Chunk, plan: Plan, setup: TrialSetup | None
    ) -> SuiteChunk:
        """Run one chunk of a suite on the model that a plan makes.

        Args:
            suite: What is measured.
            chunk: The unit of work, with its own items.
            plan: The edit.
            setup: The run's; None where the plan edits nothing.

        Raises:
            ScoreError: a value is not finite, or the KL divergence does not see the edit.
        """
        ...

    def plan_reading(self, request: TextRequest, count: bool) -> ReadPlan:
        """Decide how a long text is read, so that all replicas read it alike.

        Args:
            request: What is asked for.
            count: Read the text through, if need be, to learn its length.

        Raises:
            EvaluationError: the text can't be read so.
        """
        ...

    def read(
        self,
        reading: ReadPlan,
        first: int,
        count: int | None,
        files: ReadFiles | None,
        plan: Plan,
        setup: TrialSetup | None,
    ) -> Iterator[ChunkResult]:
        """Read a stretch of a long text with the model that a plan makes, and yield its chunks.

        Args:
            reading: How it is read.
            first: Number of the first chunk; earlier ones may be yielded too.
            count: Chunks to read; None for all there are.
            files: What is stored on the disk meanwhile, if all chunks are read.
            plan: The edit.
            setup: The run's; None where the plan edits nothing.

        Raises:
            EvaluationError: a chunk can't be read.
        """
        ...


class ReplicaApi(UneditedReplicaApi, Protocol):
    """Everything that another process asks of a run's replica; `Replica` implements it.

    `pool.call(ReplicaApi.tune, 3)` sends the method's name and the arguments to a free replica. An
    argument may be a reference to a value in the object store (`Reference.argument`).
    """

    def tune(self, replicas: int = 1) -> Tuning:
        """Choose batch sizes and trials per pass for a run of so many replicas.

        Raises:
            ModelError: not even one row fits into memory.
        """
        ...

    def find_response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """Return the tokens that the base model's answers to all these prompts begin with."""
        ...

    def extract_residuals(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning | None = None,
    ) -> RecordBatch:
        """Extract the base model's residuals of one fixed batch: the record batch of a shard.

        Args:
            name: The prompt set's.
            first: The first prompt's position in the set.
            prompts: The batch.
            response_prefix: Tokens after each prompt.
            tuning: How to compute; this replica's own choice if None.

        Raises:
            ModelError: a residual is not finite.
        """
        ...

    def shows_behaviour(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning,
    ) -> tuple[str, int, list[bool | None]]:
        """Test whether the base model shows the behaviour at each prompt of one fixed batch.

        The recipe's own test decides (`Recipe.behaviour_test`).

        Args:
            name: The prompt set's; returned, as `first` is, since batches end in any order.
            first: The first prompt's position in the set.
            prompts: The batch.
            response_prefix: Tokens after each prompt.
            tuning: How to compute.

        Returns:
            `name`, `first`, and a verdict for each prompt: None where the test can't tell.
        """
        ...

    def direction_effect(
        self, prompts: EffectPrompts, layer: int, length: float, setup: TrialSetup
    ) -> LayerScores:
        """Measure what one layer's direction does to answers; see `DirectionEffects.scores`.

        Args:
            prompts: Held-out prompts.
            layer: Whose direction.
            length: How far it is added, in units of the residual stream.
            setup: The run's, with the directions.
        """
        ...

    def evaluate(
        self, plan: Plan, setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> Evaluation:
        """Score the model that a plan makes; afterwards it is the base model again, bit for bit.

        With thresholds, scoring ends as soon as a finished trial is certain to be better; the
        scores that are left are then bounds.

        Raises:
            ScoreError: a score is not finite, or says that nothing changed although weights did.
        """
        ...

    def evaluate_in_shared_passes(
        self, plans: Sequence[Plan], setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> list[Evaluation | Exception]:
        """Score several plans in the same passes, by virtual edits.

        Returns:
            An evaluation for each plan, or the error with which that plan alone failed.

        Raises:
            ModelError: this model's passes can't be shared.
        """
        ...

    def profile_trial(self, plan: Plan, setup: TrialSetup) -> TrialProfile:
        """Profile one evaluation of a plan, after another one to warm up."""
        ...

    def first_edited_block(self, plan: Plan, setup: TrialSetup) -> int:
        """Return the first block that a plan edits; 0 if it edits none."""
        ...
