"""The divergence along answers, on a replica whose model is edited; nothing is stored of it."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.kl_divergence import KlDivergenceScorer
from ray_abliterate.evaluation.suites.kl_divergence import KlDivergenceSuite
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import KlDivergence
from ray_abliterate.recipe.suites import KlSuite
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from tests.evaluation.suites.conftest import ablating, run_suite


def kl(base: Path, **options: object) -> KlDivergenceSuite:
    given = {"kind": "kl", "prompts": {"file": "neutral.txt"}, "tokens": 4, "chunk": 3, **options}
    return KlDivergenceSuite(KlSuite.model_validate(given), base)


def test_kl_is_the_scorers_of_as_many_tokens(
    replica: Replica, setup: TrialSetup, neutral: PromptSet, base: Path
) -> None:
    suite, plan = kl(base), ablating(replica)
    (score,) = suite.summary(run_suite(replica, suite, plan, setup))
    settings = {"kind": "kl-divergence", "prompts": {"file": "neutral.txt"}, "tokens": 4}
    scorer = KlDivergenceScorer(KlDivergence.model_validate(settings), neutral)
    scorer.prepare(replica.model)
    with replica.cache.edited(plan, setup.directions):
        expected = scorer.score(replica.model)
    assert score.value == pytest.approx(expected.value, rel=1e-5)
    assert score.value > 0
    assert score.detail["tokens"] == expected.detail["tokens"]


def test_kl_of_the_base_model_is_0(replica: Replica, setup: TrialSetup, base: Path) -> None:
    suite = kl(base)
    (score,) = suite.summary(run_suite(replica, suite, Plan.nothing(), setup))
    assert score.value == 0.0
    assert score.detail["identical"] == score.detail["tokens"]


def test_a_kl_that_does_not_see_the_edit_is_an_error(
    replica: Replica, setup: TrialSetup, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = torch.randn(9, 30)

    def blind(_self: object, prompts: list, continuations: list) -> list:
        return [constant[: len(ids)] for ids in continuations]

    monkeypatch.setattr(LanguageModel, "continuation_logits", blind)
    suite = kl(base)
    assert run_suite(replica, suite, Plan.nothing(), setup)
    with pytest.raises(ScoreError, match="does not see the edit"):
        run_suite(replica, suite, ablating(replica), setup)


def test_the_base_logits_of_one_chunk_are_held_and_no_more(
    replica: Replica, setup: TrialSetup, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = LanguageModel.continuation_logits

    def counted(self: LanguageModel, prompts: list, continuations: list) -> list:
        asked.append(sum(map(len, continuations)))
        return real(self, prompts, continuations)

    monkeypatch.setattr(LanguageModel, "continuation_logits", counted)
    run_suite(replica, kl(base, chunk=2), ablating(replica), setup)
    assert len(asked) == 2 * 4
    assert max(asked) <= 2 * 4
    assert [len(c.items) for c in kl(base, chunk=None, tokens=128).chunks()] == [2, 2, 2, 1]


def test_nothing_is_kept_of_what_a_suite_asks(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    replica.evaluate(Plan.nothing(), setup)
    encoded, known = dict(replica.model._encoded), dict(replica.model._stored_batches)
    run_suite(replica, kl(base), ablating(replica), setup)
    assert replica.model._encoded == encoded
    assert replica.model._stored_batches.keys() == known.keys()


def test_a_trial_scores_the_same_before_and_after_a_suite(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    plan = ablating(replica)
    before = replica.evaluate(plan, setup).scorecard
    run_suite(replica, kl(base), plan, setup)
    assert replica.evaluate(plan, setup).scorecard == before
