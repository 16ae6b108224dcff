"""Suites on a replica: measured on edited models, with nothing kept of it."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.residuals.residual_set import join
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.kl_divergence import KlDivergenceScorer
from ray_abliterate.evaluation.suites.kl_divergence import KlDivergenceSuite
from ray_abliterate.evaluation.suites.over_refusal import OverRefusal
from ray_abliterate.evaluation.suites.responses import Responses
from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import KlDivergence, Recipe
from ray_abliterate.recipe.suites import KlSuite, OverRefusalSuite, ResponsesSuite
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, neutral: PromptSet, behaviour: PromptSet
) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    for prompts in (neutral, behaviour):
        text = "\n".join(prompt.user for prompt in prompts.prompts)
        (folder / f"{prompts.name}.txt").write_text(text)
    return folder


@pytest.fixture
def replica(recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Replica:
    return Replica(recipe, str(planted), {"keyword-rate": behaviour, "kl-divergence": neutral})


@pytest.fixture
def setup(replica: Replica, recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> TrialSetup:
    shards = [
        ResidualShard(replica.extract_residuals(s.name, 0, s.prompts, ())) for s in (behaviour, neutral)
    ]
    return TrialSetup(directions_from_residuals(*(join([shard]) for shard in shards), recipe.direction))


def ablating(replica: Replica) -> Plan:
    return Plan.uniform(replica.describe().shape, 2.3, "none", 1.0)


def kl(base: Path, **options: object) -> KlDivergenceSuite:
    given = {"kind": "kl", "prompts": {"file": "neutral.txt"}, "tokens": 4, "chunk": 3, **options}
    return KlDivergenceSuite(KlSuite.model_validate(given), base)


def run(replica: Replica, suite: object, plan: Plan, setup: TrialSetup) -> list[SuiteChunk]:
    return [replica.measure(suite, chunk, plan, setup) for chunk in suite.chunks()]


def test_kl_is_the_scorers_of_as_many_tokens(
    replica: Replica, setup: TrialSetup, neutral: PromptSet, base: Path
) -> None:
    suite, plan = kl(base), ablating(replica)
    (score,) = suite.summary(run(replica, suite, plan, setup))
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
    (score,) = suite.summary(run(replica, suite, Plan.nothing(), setup))
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
    assert run(replica, suite, Plan.nothing(), setup)
    with pytest.raises(ScoreError, match="does not see the edit"):
        run(replica, suite, ablating(replica), setup)


def test_the_base_logits_of_one_chunk_are_held_and_no_more(
    replica: Replica, setup: TrialSetup, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = LanguageModel.continuation_logits

    def counted(self: LanguageModel, prompts: list, continuations: list) -> list:
        asked.append(sum(map(len, continuations)))
        return real(self, prompts, continuations)

    monkeypatch.setattr(LanguageModel, "continuation_logits", counted)
    run(replica, kl(base, chunk=2), ablating(replica), setup)
    assert len(asked) == 2 * 4
    assert max(asked) <= 2 * 4
    assert [len(c.items) for c in kl(base, chunk=None, tokens=128).chunks()] == [2, 2, 2, 1]


def test_an_edit_shows_in_refusals_and_pairs_show_it(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    (base / "p.csv").write_text(
        "prompt\n" + (base / "behaviour.txt").read_text() + "\n", encoding="utf-8"
    )
    given = {"kind": "over-refusal", "table": {"file": "p.csv"}, "label": "", "category": ""}
    suite = OverRefusal(OverRefusalSuite.model_validate({**given, "max_new_tokens": 4}), base)
    before = run(replica, suite, Plan.nothing(), setup)
    after = run(replica, suite, ablating(replica), setup)
    assert (suite.summary(before)[0].value, suite.summary(after)[0].value) == (1.0, 0.0)
    (found,) = suite.compare(before, after)
    assert (found.difference, found.items) == (-1.0, 7)
    assert found.p == pytest.approx(2 / 2**7)
    assert found.high < 0


def test_nothing_is_kept_of_what_a_suite_asks(replica: Replica, setup: TrialSetup, base: Path) -> None:
    replica.evaluate(Plan.nothing(), setup)
    encoded, known = dict(replica.model._encoded), dict(replica.model._stored_batches)
    run(replica, kl(base), ablating(replica), setup)
    assert replica.model._encoded == encoded
    assert replica.model._stored_batches.keys() == known.keys()


def test_a_trial_scores_the_same_before_and_after_a_suite(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    plan = ablating(replica)
    before = replica.evaluate(plan, setup).scorecard
    run(replica, kl(base), plan, setup)
    assert replica.evaluate(plan, setup).scorecard == before


def test_sampled_answers_follow_their_seed_and_leave_the_generators_alone(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    def answers(**options: object) -> list[str]:
        given = {"kind": "responses", "prompts": {"file": "neutral.txt"}, "max_new_tokens": 6}
        settings = ResponsesSuite.model_validate({**given, "temperature": 5.0, **options})
        own = run(replica, Responses(settings, base), Plan.nothing(), setup)
        return [row["answer"] for result in own for row in result.rows]

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = answers()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert answers() == first
    assert answers(seed=1) != first
    assert len(set(answers())) > 1
    greedy = replica.model.answer([*(_prompts(base))], 6)
    assert answers(temperature=0.0) == [answer.text for answer in greedy]
    assert answers(top_p=1e-6) == answers(temperature=0.0)


def _prompts(base: Path) -> list:
    return list(PromptSet.of("n", *(base / "neutral.txt").read_text().splitlines()).prompts)
