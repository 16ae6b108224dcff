"""Scores trials: a run's scorers on one model, for one plan, or for several in shared passes.

Scorers learn the base model once per setup; each plan is then a `with` block that undoes itself.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_abliterate.ablation.virtual_edits import VirtualEdits
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.build import Judges, build_scorers
from ray_abliterate.evaluation.scorers.early_stopping import score_all
from ray_abliterate.evaluation.scorers.scorer import AnswerRecorder, Scorer
from ray_abliterate.evaluation.scorers.shared_generation import share_generation
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import Evaluation, TrialSetup
from ray_abliterate.replica.shared_passes import SharedPasses
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Scorecard


class TrialScorer:
    """The recipe's scorers on one replica's model.

    Attributes:
        scorers: The scorers, prepared for one setup; none before the first plan.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        cache: WeightCache,
        prompts: Mapping[str, PromptSet],
        judges: Judges | None,
        tune: Callable[[], Tuning],
    ) -> None:
        """Score nothing yet.

        Args:
            recipe: What is scored, and whether answers are recorded.
            model: The model, as it was loaded.
            cache: Pristine weights of its writers.
            prompts: The scorers' prompt sets, by the scorer's name.
            judges: Judges that work in other processes, by the scorer's name.
            tune: Chooses how to compute where a setup doesn't say.
        """
        self._recipe, self._model, self._cache = recipe, model, cache
        self._prompts, self._judges, self._tune = prompts, judges, tune
        self._virtual: VirtualEdits | None = None
        self.scorers: tuple[Scorer, ...] = ()
        self._prepared_for = ""

    def evaluate(
        self, plan: Plan, setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> Evaluation:
        """Score the model that a plan makes; afterwards it is the base model again, bit for bit.

        Raises:
            ScoreError: a score is not finite, or says that nothing changed although weights did.
        """
        self.prepare(setup)
        started, written = time.perf_counter(), self._model.tokens_written
        with (
            self._cache.edited(plan, setup.directions),
            self._model.untouched_below(self._cache.untouched),
        ):
            card = score_all(self.scorers, share_generation(self.scorers, self._model), thresholds)
            self._refuse_dead_metrics(card)
        rows = self._answers(self.scorers, card) if self._recipe.run.record_responses else ()
        tokens = self._model.tokens_written - written
        return Evaluation(card, time.perf_counter() - started, rows, tokens=tokens)

    def evaluate_in_shared_passes(
        self, plans: Sequence[Plan], setup: TrialSetup, thresholds: ThresholdSet | None = None
    ) -> list[Evaluation | Exception]:
        """Score several plans in the same passes, by virtual edits; an error fails only its plan.

        Raises:
            ModelError: this model's passes can't be shared.
        """
        self.prepare(setup)
        if self._virtual is None:
            self._virtual = VirtualEdits(self._model.packed, self._cache)
        started, written = time.perf_counter(), self._model.tokens_written

        def work(view: TextModel) -> tuple[Scorecard, float, tuple[dict[str, Any], ...]]:
            scorers = tuple(copy.copy(scorer) for scorer in self.scorers)
            card = score_all(scorers, share_generation(scorers, view), thresholds)
            rows = self._answers(scorers, card) if self._recipe.run.record_responses else ()
            return card, (time.perf_counter() - started) / len(plans), rows

        with (
            self._virtual.applied(plans, setup.directions) as untouched,
            self._model.untouched_below(untouched),
        ):
            passes = SharedPasses[tuple[Scorecard, float, tuple[dict[str, Any], ...]]](self._model)
            results = passes.run([work] * len(plans))
        tokens = (self._model.tokens_written - written) // len(plans)
        return [
            result
            if isinstance(result, Exception)
            else Evaluation(*result, shared=True, tokens=tokens)
            for result in results
        ]

    def prepare(self, setup: TrialSetup) -> None:
        """Have the scorers learn the base model for this setup, if they have not."""
        key = setup.key
        if key == self._prepared_for:
            return
        self._model.response_prefix = setup.response_prefix
        self._model.use(setup.tuning or self._tune())
        recipe = self._recipe
        self._cache.precompute_projections(setup.directions, recipe.edit.norm)
        record = recipe.run.record_responses
        scorers = build_scorers(recipe.scorers, self._prompts, record, self._judges)
        with self._model.learning():
            shared = share_generation(scorers, self._model)
            for scorer in scorers:
                scorer.prepare(shared)
        self.scorers, self._prepared_for = scorers, key

    def _refuse_dead_metrics(self, card: Scorecard) -> None:
        """Refuse a KL divergence of exactly 0 with edited weights: it does not see the edit."""
        kinds = {setting.name: setting.kind for setting in self._recipe.scorers}
        exact = [score for score in card.scores if not score.bound]
        zero = [s.name for s in exact if kinds.get(s.name) == "kl-divergence" and s.value == 0]
        if zero and self._cache.differs():
            raise ScoreError(
                f"{zero[0]} is exactly 0 although weights were edited: the metric does not see "
                "the edit (does the response prefix force the answer?)"
            )

    @staticmethod
    def _answers(scorers: Sequence[Scorer], card: Scorecard) -> tuple[dict[str, Any], ...]:
        """Return rows of the scorers that scored; others still hold an earlier trial's answers."""
        scored = {score.name for score in card.scores if not score.bound}
        rows = []
        for scorer in scorers:
            if not isinstance(scorer, AnswerRecorder) or scorer.name not in scored:
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
