"""A replica: one model in one process, with its weight cache and scorers. A plain class.

All it is comes from its constructor, so a restarted replica answers as the old one did. What it
learns later (products with directions, base logits) is memoised from arguments, never state.
"""

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_abliterate.ablation.virtual_edits import VirtualEdits
from ray_abliterate.ablation.weight_cache import SharedStore, WeightCache
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_selection import LayerScores
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.build import Judges, build, shown
from ray_abliterate.evaluation.scorers.shared_generation import sharing
from ray_abliterate.evaluation.streaming import ChunkResult
from ray_abliterate.evaluation.streaming.reader import Keeping, Reader, Reading, Route
from ray_abliterate.evaluation.suites.build import measure
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.model.architecture import WriterRow, find_writers, hidden_size
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.model.component_outputs import Places, contributing
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.loading import where_weights_rest
from ray_abliterate.model.quantization import described, outline
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.describe import facts_of
from ray_abliterate.replica.direction_effects import Probe, Prober
from ray_abliterate.replica.messages import Evaluation, ModelFacts
from ray_abliterate.replica.profiling import Profile, profiled
from ray_abliterate.replica.shared_passes import Together
from ray_abliterate.replica.tuning import extent_of, tuning_of
from ray_abliterate.search.dominance import Bar, score_all
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Recorder, Scorecard, Scorer, TextModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What every evaluation of a run shares, and travels by reference.

    Attributes:
        directions: The directions.
        response_prefix: Tokens after which answers are compared.
        tuning: How to compute; each replica's own choice if None.
    """

    directions: Directions
    response_prefix: tuple[int, ...] = ()
    tuning: Tuning | None = None

    @property
    def key(self) -> str:
        """Content key."""
        rest = repr((self.response_prefix, self.tuning)).encode()
        return hashlib.sha256(self.directions.bits() + rest).hexdigest()


class Replica:
    """One model that extracts residuals, evaluates plans and answers."""

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
            judges: Those that work elsewhere, by the scorer's name.
            threads: CPU threads; 0 leaves torch's own choice.
            store: Holds what the replicas of one node share; none if it is alone.
        """
        if threads:
            torch.set_num_threads(threads)
        self._recipe = recipe
        self._prompts, self._judges = prompts, judges
        self.model = LanguageModel.load(source, recipe.model, recipe.run.batch_size)
        rows = tuple(WriterRow(**row.model_dump()) for row in recipe.model.writers)
        module = self.model.module
        in_memory = not (described(module) or where_weights_rest(module))
        self._writers = find_writers(outline(module), rows, in_memory)
        location = recipe.model.cache_location(self.model.device.type != "cpu")
        self.cache = WeightCache(self.model.module, self._writers, location, store)
        if self.model.upcast is not None:
            self.cache.on_write = self.model.upcast.written
        self.model.original = self.cache.suspended
        self._reader = Reader(self.model)
        self._prober = Prober(self.model, self.cache, self._shape())
        self._virtual: VirtualEdits | None = None
        self._scorers: tuple[Scorer, ...] = ()
        self._prepared_for = ""

    def describe(self) -> ModelFacts:
        """The model's shape and sizes."""
        return facts_of(
            self.model,
            self.cache,
            self._shape(),
            len(self._writers),
            self._recipe.model.attention,
            extent_of(self.model, self._recipe, self._prompts),
        )

    def _shape(self) -> ModelShape:
        components = tuple(sorted({writer.component for writer in self._writers}))
        return ModelShape(len(self.model.blocks), hidden_size(self.model.module), components)

    def tune(self, replicas: int = 1) -> Tuning:
        """How this run's replicas, so many, compute, see `tuning.tuning_of`."""
        return tuning_of(self.model, self.cache, self._recipe, self._prompts, replicas)

    def response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """The tokens that the base model's answers to all these prompts begin with."""
        self.model.response_prefix = ()
        return self.model.find_response_prefix(prompts)

    def residuals(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning | None = None,
    ) -> Any:
        """Residuals of one fixed batch of prompts, on the base model: a shard's record batch.

        Args:
            name: The prompt set's.
            first: The first prompt's place in the set.
            prompts: The batch.
            response_prefix: Tokens after each prompt.
            tuning: How to compute; this replica's own choice if None.

        Raises:
            ModelError: a residual is not finite.
        """
        self.model.response_prefix = response_prefix
        if tuning is not None:
            self.model.use(tuning)
        settings, layers = self._recipe.direction, len(self.model.blocks)
        more: Places = ()
        if settings.per_component:
            more = contributing(self.model.module, self._writers, layers)
        values = self.model.residuals(prompts, settings.positions, more).numpy()
        return ResidualShard.of(name, first, values, settings.residual_dtype).batch

    def shows(
        self,
        name: str,
        first: int,
        prompts: Sequence[Prompt],
        response_prefix: tuple[int, ...],
        tuning: Tuning,
    ) -> tuple[str, int, list[bool | None]]:
        """Whether the base model shows the behaviour at each prompt of one fixed batch.

        By the recipe's own test (`Recipe.behaviour_test`); None where it can't be told.

        Args:
            name: The prompt set's; given back, as `first` is, since batches end in any order.
            first: The first prompt's place in the set.
            prompts: The batch.
            response_prefix: Tokens after each prompt.
            tuning: How to compute.
        """
        self.model.response_prefix = response_prefix
        self.model.use(tuning)
        test = self._recipe.behaviour_test
        assert test is not None
        with self.model.passing():
            return name, first, shown(test, prompts, self.model, self._judges)

    def probe(self, probe: Probe, layer: int, length: float, setup: Setup) -> LayerScores:
        """What one layer's direction does to held-out prompts, see `Prober.scores`."""
        self.model.response_prefix = setup.response_prefix
        if setup.tuning is not None:
            self.model.use(setup.tuning)
        return self._prober.scores(probe, layer, length, setup.directions)

    def evaluate(self, plan: Plan, setup: Setup, bar: Bar | None = None) -> Evaluation:
        """Score the model that a plan makes; the model is the base model again afterwards.

        With a bar, scoring ends, with bounds, as soon as a finished trial is better for certain.

        Raises:
            ScoreError: a score is not a finite number, or says that nothing changed although
                weights did.
        """
        self._prepare(setup)
        started, written = time.perf_counter(), self.model.tokens_written
        with (
            self.cache.edited(plan, setup.directions),
            self.model.untouched_below(self.cache.untouched),
        ):
            card = score_all(self._scorers, sharing(self._scorers, self.model), bar)
            self._refuse_dead_metrics(card)
        rows = self._answers(self._scorers, card) if self._recipe.run.record_responses else ()
        tokens = self.model.tokens_written - written
        return Evaluation(card, time.perf_counter() - started, rows, tokens=tokens)

    def profile(self, plan: Plan, setup: Setup) -> Profile:
        """Where the time of one trial goes; it is evaluated once before, to warm up."""
        self.evaluate(plan, setup)
        return profiled(lambda: self.evaluate(plan, setup))

    def evaluate_together(
        self, plans: Sequence[Plan], setup: Setup, bar: Bar | None = None
    ) -> list[Evaluation | Exception]:
        """Score several plans in the same passes, by virtual edits; a failure fails its plan only.

        Raises:
            ModelError: this model's passes can't be shared.
        """
        self._prepare(setup)
        if self._virtual is None:
            self._virtual = VirtualEdits(self.model.packed, self.cache)
        started, written = time.perf_counter(), self.model.tokens_written

        def work(view: TextModel) -> tuple[Scorecard, float, tuple[dict[str, Any], ...]]:
            scorers = tuple(copy.copy(scorer) for scorer in self._scorers)
            card = score_all(scorers, sharing(scorers, view), bar)
            rows = self._answers(scorers, card) if self._recipe.run.record_responses else ()
            return card, (time.perf_counter() - started) / len(plans), rows

        with (
            self._virtual.opened(plans, setup.directions) as untouched,
            self.model.untouched_below(untouched),
        ):
            together = Together[tuple[Scorecard, float, tuple[dict[str, Any], ...]]](self.model)
            found = together.run([work] * len(plans))
        tokens = (self.model.tokens_written - written) // len(plans)
        return [
            result
            if isinstance(result, Exception)
            else Evaluation(*result, shared=True, tokens=tokens)
            for result in found
        ]

    def measure(self, suite: Suite, chunk: Chunk, plan: Plan, setup: Setup) -> SuiteChunk:
        """One chunk of a suite on the model that a plan makes; nothing of it is kept here.

        Raises:
            ScoreError: a value is not a finite number, or the KL divergence does not see the edit.
        """
        self.model.response_prefix = setup.response_prefix
        if setup.tuning is not None:
            self.model.use(setup.tuning)
        with self.cache.edited(plan, setup.directions), self.model.passing():
            found = measure(suite, self.model, chunk)
            same = found.counts.get("identical")
            if same is not None and same == found.counts.get("tokens") and self.cache.differs():
                raise ScoreError(
                    f"suite {suite.name!r}, chunk {chunk.id}: all logits are the base model's "
                    "although weights were edited: the suite does not see the edit"
                )
        return found

    def route(self, reading: Reading, count: bool) -> Route:
        """How a long text is read, see `Reader.route`."""
        return self._reader.route(reading, count)

    def read(
        self,
        route: Route,
        first: int,
        count: int | None,
        keeping: Keeping | None,
        plan: Plan,
        setup: Setup,
    ) -> Iterator[ChunkResult]:
        """A stretch of a long text on the model that a plan makes, see `Reader.read`."""
        with self.cache.edited(plan, setup.directions):
            yield from self._reader.read(route, first, count, keeping)

    def begins(self, plan: Plan, setup: Setup) -> int:
        """The first block that a plan edits; 0 if it edits none."""
        edits = self.cache.edits(plan, setup.directions)
        return min((writer.layer for writer, _ in edits), default=0)

    def respond(
        self,
        turns: Sequence[dict[str, str]],
        plan: Plan,
        setup: Setup,
        max_new_tokens: int = 256,
        piece: Callable[[str], bool] | None = None,
    ) -> str:
        """The edited model's next turn of a conversation, see `LanguageModel.reply`."""
        self.model.response_prefix = setup.response_prefix
        with self.cache.edited(plan, setup.directions):
            return self.model.reply(turns, max_new_tokens, piece)

    def _prepare(self, setup: Setup) -> None:
        """Scorers that know the base model, for this response prefix."""
        key = setup.key
        if key == self._prepared_for:
            return
        self.model.response_prefix = setup.response_prefix
        self.model.use(setup.tuning or self.tune())
        recipe = self._recipe
        self.cache.multiply(setup.directions, recipe.edit.norm)
        record = recipe.run.record_responses
        scorers = build(recipe.scorers, self._prompts, record, self._judges)
        with self.model.learning():
            shared = sharing(scorers, self.model)
            for scorer in scorers:
                scorer.prepare(shared)
        self._scorers, self._prepared_for = scorers, key

    def _refuse_dead_metrics(self, card: Scorecard) -> None:
        kinds = {setting.name: setting.kind for setting in self._recipe.scorers}
        exact = [score for score in card.scores if not score.bound]
        zero = [s.name for s in exact if kinds.get(s.name) == "kl-divergence" and s.value == 0]
        if zero and self.cache.differs():
            raise ScoreError(
                f"{zero[0]} is exactly 0 although weights were edited: the metric does not see "
                "the edit (is the response prefix forcing the answer?)"
            )

    @staticmethod
    def _answers(scorers: Sequence[Scorer], card: Scorecard) -> tuple[dict[str, Any], ...]:
        """Rows of the scorers that scored; the others still hold an earlier trial's answers."""
        scored = {score.name for score in card.scores if not score.bound}
        rows = []
        for scorer in scorers:
            if not isinstance(scorer, Recorder) or scorer.name not in scored:
                continue
            for prompt, answer, shows in scorer.last_answers():
                rows.append(
                    {
                        "scorer": scorer.name,
                        "prompt": prompt.user,
                        "answer": answer.text,
                        "tokens": answer.tokens,
                        "shows_behaviour": shows,
                    }
                )
        return tuple(rows)
