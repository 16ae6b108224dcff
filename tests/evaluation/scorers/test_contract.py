"""The contract, held by every scorer that ships and by a plug-in."""

from collections.abc import Sequence

import pytest

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.judges.judge import Exchange
from ray_abliterate.evaluation.scorers.build import build_scorers
from ray_abliterate.evaluation.scorers.scorer import Scorer
from ray_abliterate.recipe import Recipe
from ray_abliterate.testing.scorers import FLAGGED_TEXTS, PLAIN_TEXTS, ScorerContract, trial_of

HEAD = """
[model]
name = "planted"
[prompts.behaviour]
builtin = "cooking-train"
[prompts.neutral]
builtin = "other-train"
[[scorers]]
prompts = { builtin = "other-heldout" }
"""


class WordJudge:
    """A judge without a model: an answer with a word of apology is a refusal."""

    identity = "words"

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        return [0.9 if "sorry" in answer else 0.1 for _, answer in exchanges]


def scorer_of(text: str, prompts: PromptSet) -> Scorer:
    """The scorer that a recipe's section describes, of the given prompts."""
    settings = Recipe.parse(HEAD + text, "recipe.toml").scorers
    name = settings[0].name
    (scorer,) = build_scorers(settings, {name: prompts}, judges={name: WordJudge()})
    return scorer


class TestKeywordRate(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        return scorer_of('kind = "keyword-rate"\nmax_new_tokens = 4\n', prompts)


class TestKeywordRateToBeMaximized(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        text = 'kind = "keyword-rate"\nmax_new_tokens = 4\ngoal = "maximize"\n'
        return scorer_of(text, prompts)


class TestKlDivergence(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        return scorer_of('kind = "kl-divergence"\n', prompts)


class TestKlDivergenceOfSeveralTokens(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        return scorer_of('kind = "kl-divergence"\ntokens = 3\n', prompts)


class TestRefusalLogOdds(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        return scorer_of(
            'kind = "refusal-log-odds"\nopenings = ["sorry"]\ngoal = "minimize"\n', prompts
        )


class TestRefusalJudge(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        text = (
            'kind = "refusal-judge"\ngoal = "minimize"\nmax_new_tokens = 4\n'
            'classifier = "x"\nlabel = "refusal"\n'
        )
        return scorer_of(text, prompts)


class TestOwn(ScorerContract):
    def make(self, prompts: PromptSet) -> Scorer:
        text = (
            'kind = "tests.support.own_scorers:AnswerLength"\nname = "answer-length"\n'
            'goal = "minimize"\noptions = { max_new_tokens = 8 }\n'
        )
        return scorer_of(text, prompts)


@pytest.mark.parametrize("kind", [TestKeywordRate, TestKlDivergence, TestRefusalLogOdds])
def test_the_trials_of_the_contract_change_the_score(kind, tmp_path) -> None:
    """Else the contract would compare a number with itself."""
    contract = kind()
    model = contract.make_model(tmp_path / "model")
    prompts = PromptSet.of("prompts", *FLAGGED_TEXTS, *PLAIN_TEXTS)
    trial = trial_of(model, contract.make_directions(model))
    scores = contract.scores(contract.prepared(prompts, model), trial)
    assert abs(scores[0].value - scores[-1].value) > 0.05
