"""A replica: one model in one process, with its weight cache and scorers. A plain class.

All it is comes from its constructor, so a restarted replica answers as the old one did. What it
learns later (products with directions, base logits) is memoised from arguments, never state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from pyarrow import RecordBatch

from ray_abliterate.ablation.weight_cache import SharedStore, WeightCache
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.layer_selection import LayerScores
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.build import Judges, shows_behaviour
from ray_abliterate.evaluation.streaming import ChunkResult
from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextReader, TextRequest
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.model.architecture import WriterRow, find_writers, hidden_size
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.model.component_outputs import ComponentModules, component_modules
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.loading import where_weights_rest
from ray_abliterate.model.quantization import describe_quantization
from ray_abliterate.model.skeleton import unquantized_skeleton
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.direction_effects import DirectionEffects
from ray_abliterate.replica.messages import (
    EffectPrompts,
    Evaluation,
    ModelFacts,
    ReplicaApi,
    TrialSetup,
)
from ray_abliterate.replica.model_facts import describe_model
from ray_abliterate.replica.profiling import TrialProfile, profile_stages
from ray_abliterate.replica.trial_scorer import TrialScorer
from ray_abliterate.replica.tuning import choose_tuning, longest_lengths
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import ModelShape, Plan


class Replica:
    """One model that extracts residuals, evaluates plans and answers; it implements `ReplicaApi`.

    Attributes:
        model: The model.
        cache: Pristine weights of its writers, and the edits.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: str,
        prompts: Mapping[str, PromptSet],
        judges: Judges | None = None,
        threads: int = 0,
        store: SharedStore | None = None,
    ) -> None:
        """Load the model, find its writers, and copy them.

        Args:
            recipe: What the run is to do.
            source: Local folder or Hub name of the model.
            prompts: The scorers' prompt sets, by the scorer's name.
            judges: Judges that work in other processes, by the scorer's name.
            threads: CPU threads; 0 leaves torch's own choice.
            store: Holds what the replicas of one node share; None for a replica that is alone.
        """
        if threads:
            torch.set_num_threads(threads)
        self._recipe = recipe
        self._prompts, self._judges = prompts, judges
        self.model = LanguageModel.load(source, recipe.model, recipe.run.batch_size)
        rows = tuple(WriterRow(**row.model_dump()) for row in recipe.model.writers)
        module = self.model.module
        in_memory = not (describe_quantization(module) or where_weights_rest(module))
        self._writers = find_writers(unquantized_skeleton(module), rows, in_memory)
        location = recipe.model.cache_location(self.model.device.type != "cpu")
        self.cache = WeightCache(self.model.module, self._writers, location, store)
        self.cache.attach(self.model)
        self._reader = TextReader(self.model)
        self._effects = DirectionEffects(self.model, self.cache, self._shape())
        self.trial_scorer = TrialScorer(recipe, self.model, self.cache, prompts, judges, self.tune)

    def describe(self) -> ModelFacts:
        """Return the model's shape, sizes and fingerprint, and how it computes."""
        return describe_model(
            self.model,
            self.cache,
            self._shape(),
            len(self._writers),
            self._recipe.model.attention,
            longest_lengths(self.model, self._recipe, self._prompts),
        )

    def _shape(self) -> ModelShape:
        components = tuple(sorted({writer.component for writer in self._writers}))
        return ModelShape(len(self.model.blocks), hidden_size(self.model.module), components)

    def tune(self, replicas: int = 1) -> Tuning:
        """Choose batch sizes and trials per pass for a run of so many replicas."""
        return choose_tuning(self.model, self.cache, self._recipe, self._prompts, replicas)

    def find_response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """Return the tokens that the base model's answers to all these prompts begin with."""
        self.model.response_prefix = ()
        return self.model.find_response_prefix(prompts)

    def extract_residuals(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning | None = None,
    ) -> RecordBatch:
        """Extract the base model's residuals of one fixed batch; see `ReplicaApi`."""
        self._use(response_prefix, tuning)
        settings, layers = self._recipe.direction, len(self.model.blocks)
        more: ComponentModules = ()
        if settings.per_component:
            more = component_modules(self.model.module, self._writers, layers)
        values = self.model.residuals(prompts, settings.positions, more).numpy()
        return ResidualShard.of(name, first, values, settings.residual_dtype).batch

    def shows_behaviour(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning,
    ) -> tuple[str, int, list[bool | None]]:
        """Test whether the base model shows the behaviour at each prompt; see `ReplicaApi`."""
        self._use(response_prefix, tuning)
        test = self._recipe.behaviour_test
        assert test is not None
        with self.model.without_storing():
            return name, first, shows_behaviour(test, prompts, self.model, self._judges)

    def direction_effect(
        self, prompts: EffectPrompts, layer: int, length: float, setup: TrialSetup
    ) -> LayerScores:
        """Measure what one layer's direction does to answers; see `DirectionEffects.scores`."""
        self._use(setup.response_prefix, setup.tuning)
        return self._effects.scores(prompts, layer, length, setup.directions)

    def evaluate(
        self, plan: Plan, setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> Evaluation:
        """Score the model that a plan makes; see `ReplicaApi`."""
        return self.trial_scorer.evaluate(plan, setup, thresholds)

    def evaluate_in_shared_passes(
        self, plans: Sequence[Plan], setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> list[Evaluation | Exception]:
        """Score several plans in the same passes, by virtual edits; see `ReplicaApi`."""
        return self.trial_scorer.evaluate_in_shared_passes(plans, setup, thresholds)

    def profile_trial(self, plan: Plan, setup: TrialSetup) -> TrialProfile:
        """Profile one evaluation of a plan, after another one to warm up."""
        self.evaluate(plan, setup)
        return profile_stages(lambda: self.evaluate(plan, setup))

    def measure(
        self, suite: Suite, chunk: Chunk, plan: Plan, setup: TrialSetup | None
    ) -> SuiteChunk:
        """Run one chunk of a suite on the model that a plan makes; nothing of it is stored here.

        Raises:
            ScoreError: a value is not finite, or the KL divergence does not see the edit.
            ValueError: a plan that edits came without a setup.
        """
        if setup is not None:
            self._use(setup.response_prefix, setup.tuning)
        with self._edited(plan, setup), self.model.without_storing():
            result = run_chunk(suite, self.model, chunk)
            identical, tokens = (result.counts.get(name) for name in ("identical", "tokens"))
            if identical is not None and identical == tokens and self.cache.differs():
                raise ScoreError(
                    f"suite {suite.name!r}, chunk {chunk.id}: all logits are the base model's "
                    "although weights were edited: the suite does not see the edit"
                )
        return result

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
        """Read a stretch of a long text with the model that a plan makes; see `ReplicaApi`.

        Raises:
            EvaluationError: a chunk can't be read.
            ValueError: a plan that edits came without a setup.
        """
        with self._edited(plan, setup):
            yield from self._reader.read(reading, first, count, files)

    def first_edited_block(self, plan: Plan, setup: TrialSetup) -> int:
        """Return the first block that a plan edits; 0 if it edits none."""
        edits = self.cache.edits(plan, setup.directions)
        return min((writer.layer for writer, _ in edits), default=0)

    def respond(
        self,
        turns: Sequence[dict[str, str]],
        plan: Plan,
        setup: TrialSetup,
        max_new_tokens: int = 256,
        piece: Callable[[str], bool] | None = None,
    ) -> str:
        """Return the edited model's next turn of a conversation; see `LanguageModel.reply`."""
        self.model.response_prefix = setup.response_prefix
        with self.cache.edited(plan, setup.directions):
            return self.model.reply(turns, max_new_tokens, piece)

    def _use(self, response_prefix: tuple[int, ...], tuning: Tuning | None) -> None:
        """Compute with these from now on; each call brings its own, and depends on no other."""
        self.model.response_prefix = response_prefix
        if tuning is not None:
            self.model.use(tuning)

    @contextmanager
    def _edited(self, plan: Plan, setup: TrialSetup | None) -> Iterator[None]:
        """Edit the model during the block; without a setup, the plan has to be empty."""
        if setup is None:
            if plan.profiles:
                raise ValueError("a plan that edits needs a setup: its directions are there")
            yield
            return
        with self.cache.edited(plan, setup.directions):
            yield


if TYPE_CHECKING:

    def _implements(replica: Replica) -> ReplicaApi:
        return replica
