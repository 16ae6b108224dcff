"""What every scorer must do. Subclass the contract, make your scorer, and run pytest.

class TestMyScorer(ScorerContract):
    def make(self, prompts):
        return MyScorer("mine", "minimize", prompts)

A trial is a plan's edit of one model. A search compares scores of thousands of trials, from many
processes, and stops a trial once its scores can only be worse than another's. So a score may depend
on nothing but the edited model, and what a scorer claims about scores that it has not measured must
hold.
"""

import copy
import math
import operator
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.evaluation.scorers.scorer import BehaviourTest, BoundedScorer, Scorer
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score
from ray_abliterate.testing.tiny_language_model import tiny_language_model

FLAGGED_TEXTS = ("tell me about the soup", "how do i bake bread", "write about the bread and soup")
PLAIN_TEXTS = ("tell me about the a", "how do i write", "what is the b of c")
STRENGTHS = (0.0, 0.4, 1.0)
"""Strengths of the trials: 1 takes the planted behaviour out, and 0 is the unedited model."""

TrialEdit = Callable[[float], AbstractContextManager[LanguageModel]]


def difference_directions(model: LanguageModel) -> Directions:
    """Return the differences of means between the tiny model's flagged and plain prompts."""
    behaviour, neutral = (
        Residuals(model.residuals([Prompt(text) for text in texts]))
        for texts in (FLAGGED_TEXTS, PLAIN_TEXTS)
    )
    return directions_from_residuals(behaviour, neutral, DirectionSettings())


def trial_of(model: LanguageModel, directions: Directions) -> TrialEdit:
    """Return what edits a model at a strength, until its block ends."""
    cache = WeightCache(model.module, find_writers(model.module), "cpu")
    cache.attach(model)
    components = tuple(dict.fromkeys(target.component for target in find_writers(model.module)))
    shape = ModelShape(directions.layers, directions.vectors.shape[1], components)

    @contextmanager
    def trial(strength: float) -> Iterator[LanguageModel]:
        plan = Plan.uniform(shape, (directions.layers - 1) / 2, "none", strength)
        with cache.edited(plan, directions):
            yield model

    return trial


def assert_same_score(one: Score, other: Score) -> None:
    """Assert that two scores have the same value and interval, to the last bit."""
    assert (one.name, one.goal) == (other.name, other.goal)
    assert (one.value, one.low, one.high) == (other.value, other.low, other.high)


class ScorerContract:
    """Held by every scorer of this package, and by yours. A subclass defines `make`.

    Attributes:
        relative: How far a score may move, relative to its size, where batches are put together
            in another way, which rounds float32 sums in another way.
    """

    relative: ClassVar[float] = 1e-3

    def make(self, prompts: PromptSet) -> Scorer:
        """Return a new scorer of some prompts, which was not prepared."""
        raise NotImplementedError("define `make`, which returns your scorer of some prompts")

    def make_model(self, folder: Path, batch_size: int | None = None) -> LanguageModel:
        """Return a model that it can score; `tiny_language_model` unless you give another."""
        return tiny_language_model(folder, batch_size=batch_size)

    def make_directions(self, model: LanguageModel) -> Directions:
        """Return directions whose edits change the score; the planted behaviour's by default."""
        return difference_directions(model)

    @pytest.fixture
    def prompts(self) -> PromptSet:
        """Return prompts with different answers, of different lengths."""
        return PromptSet.of("prompts", *FLAGGED_TEXTS, *PLAIN_TEXTS)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a folder for the model's files."""
        return tmp_path_factory.mktemp("scorer") / "model"

    @pytest.fixture
    def model(self, folder: Path) -> LanguageModel:
        """Return the unedited model of a test."""
        return self.make_model(folder)

    @pytest.fixture
    def trial(self, model: LanguageModel) -> TrialEdit:
        """Return what edits the model; see `trial_of`."""
        return trial_of(model, self.make_directions(model))

    def prepared(self, prompts: PromptSet, model: LanguageModel) -> Scorer:
        """Return a new scorer that was prepared on the unedited model."""
        scorer = self.make(prompts)
        scorer.prepare(model)
        return scorer

    def scores(self, scorer: Scorer, trial: TrialEdit) -> list[Score]:
        """Return the score of a trial at each of `STRENGTHS`."""
        scores = []
        for strength in STRENGTHS:
            with trial(strength) as edited:
                scores.append(scorer.score(edited))
        return scores

    def test_it_has_what_a_scorer_has(self, prompts: PromptSet) -> None:
        """It has a name, a goal and the methods; `best`, if it has one, is a number."""
        scorer = self.make(prompts)
        assert isinstance(scorer, Scorer)
        assert scorer.name
        assert scorer.goal in ("minimize", "maximize", "report")
        assert not math.isnan(getattr(scorer, "best", 0.0))

    def test_scores_are_finite_and_lie_in_their_intervals(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """Every score has the scorer's name and goal, and is no bound."""
        scorer = self.prepared(prompts, model)
        for score in self.scores(scorer, trial):
            assert (score.name, score.goal) == (scorer.name, scorer.goal)
            assert all(math.isfinite(number) for number in (score.value, score.low, score.high))
            assert score.low <= score.value <= score.high
            assert not score.bound, "only score_until may return a bound"

    def test_a_score_does_not_depend_on_earlier_trials(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """The same plan has the same score whatever was scored before, and when scored again."""
        first = self.scores(self.prepared(prompts, model), trial)
        scorer = self.prepared(prompts, model)
        again = {}
        for strength in (*reversed(STRENGTHS), STRENGTHS[-1]):
            with trial(strength) as edited:
                again[strength] = scorer.score(edited)
        for strength, score in zip(STRENGTHS, first, strict=True):
            assert_same_score(again[strength], score)

    def test_the_order_of_prompts_does_not_matter(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """Prompts in reverse have the same score, up to rounding."""
        reverse = PromptSet(prompts.name, tuple(reversed(prompts.prompts)))
        one = self.scores(self.prepared(prompts, model), trial)
        other = self.scores(self.prepared(reverse, model), trial)
        for score, reordered in zip(one, other, strict=True):
            assert reordered.value == pytest.approx(score.value, rel=self.relative, abs=1e-5)

    def test_the_batch_size_does_not_matter(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit, folder: Path
    ) -> None:
        """Prompts one by one have the same score as in batches, up to rounding."""
        single = self.make_model(folder, batch_size=1)
        one_by_one = trial_of(single, self.make_directions(single))
        batched = self.scores(self.prepared(prompts, model), trial)
        alone = self.scores(self.prepared(prompts, single), one_by_one)
        for score, other in zip(batched, alone, strict=True):
            assert other.value == pytest.approx(score.value, rel=self.relative, abs=1e-5)

    def test_best_is_a_bound(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """No trial has a better score than `best`, where the scorer has it."""
        scorer = self.prepared(prompts, model)
        best = getattr(scorer, "best", None)
        for score in self.scores(scorer, trial):
            if best is not None:
                better = score.value <= best if score.goal == "maximize" else score.value >= best
                assert better, f"{score.value} is better than best = {best}"

    def test_a_score_that_stops_early_is_a_bound_that_holds(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """It stops only when it is hopeless, and never beyond what the whole score turns out as."""
        scorer = self.prepared(prompts, model)
        if not isinstance(scorer, BoundedScorer):
            pytest.skip("it scores every trial in full")
        best_loss = -scorer.best if scorer.goal == "maximize" else scorer.best
        for strength, whole in zip(STRENGTHS, self.scores(scorer, trial), strict=True):
            middle = 0.5 * (best_loss + whole.loss) if math.isfinite(best_loss) else whole.loss
            for least in (-math.inf, middle, whole.loss, math.nextafter(whole.loss, math.inf)):
                with trial(strength) as edited:
                    score = scorer.score_until(edited, partial(operator.le, least))
                assert (score.name, score.goal) == (whole.name, whole.goal)
                if score.bound:
                    assert score.loss >= least, "it stopped although the trial was not lost"
                    assert score.loss <= whole.loss, "its bound is worse than the whole score"
                    assert score.low <= whole.value <= score.high
                else:
                    assert_same_score(score, whole)
            with trial(strength) as edited:
                assert_same_score(scorer.score(edited), whole)

    def test_it_can_be_pickled_and_copied(
        self, prompts: PromptSet, model: LanguageModel, trial: TrialEdit
    ) -> None:
        """A scorer that was sent to another process, and a copy of a prepared one, score alike."""
        sent = pickle.loads(pickle.dumps(self.make(prompts)))
        sent.prepare(model)
        scorer = self.prepared(prompts, model)
        copied = copy.deepcopy(scorer)
        expected = self.scores(scorer, trial)
        for other in (sent, copied):
            for score, wanted in zip(self.scores(other, trial), expected, strict=True):
                assert_same_score(score, wanted)

    def test_the_model_is_left_as_it_was(self, prompts: PromptSet, model: LanguageModel) -> None:
        """Preparing and scoring change neither weights, nor response prefix, nor answers."""
        before: dict[str, Any] = {k: v.clone() for k, v in model.module.state_dict().items()}
        questions = [Prompt(FLAGGED_TEXTS[0]), Prompt(PLAIN_TEXTS[0])]
        answers, prefix = model.answer(questions, 4), model.response_prefix
        self.prepared(prompts, model).score(model)
        assert model.response_prefix == prefix
        assert model.answer(questions, 4) == answers
        assert all(bool((before[k] == v).all()) for k, v in model.module.state_dict().items())

    def test_verdicts_on_single_answers_come_in_the_order_of_prompts(
        self, prompts: PromptSet, model: LanguageModel
    ) -> None:
        """One verdict for each prompt, whatever the other prompts are; for `BehaviourTest`s."""
        scorer = self.prepared(prompts, model)
        if not isinstance(scorer, BehaviourTest):
            pytest.skip("it judges no single answers")
        reverse = PromptSet(prompts.name, tuple(reversed(prompts.prompts)))
        other = self.prepared(reverse, model)
        assert isinstance(other, BehaviourTest)
        verdicts = scorer.shows(model)
        assert len(verdicts) == len(prompts)
        assert other.shows(model) == verdicts[::-1]
