"""Log-odds of answers that begin as refusals do."""

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ray_abliterate.data.builtin.planted_model import planted_axes
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.evaluation.scorers.refusal_log_odds import (
    RefusalLogOddsScorer,
    first_tokens,
    log_odds,
)
from ray_abliterate.recipe import KeywordRate, Recipe, RefusalLogOdds
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import Plan
from tests.support.text_models import ScriptedModel

PROMPTS = PromptSet.of("p", "one", "two", "three", "four")
SOURCE = {"builtin": "cooking-heldout"}


def keyword_rate(record: bool = False, **options: object) -> KeywordRateScorer:
    settings = KeywordRate.model_validate({"kind": "keyword-rate", "prompts": SOURCE, **options})
    return KeywordRateScorer(settings, PROMPTS, record)


def log_odds_scorer(prompts: PromptSet = PROMPTS, **options: object) -> RefusalLogOddsScorer:
    given = {"kind": "refusal-log-odds", "prompts": SOURCE, "openings": ["a"], **options}
    return RefusalLogOddsScorer(RefusalLogOdds.model_validate(given), prompts)


def test_log_odds_are_those_of_the_probabilities() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    found = log_odds(shares.log() + 7, (0, 1))
    assert found.tolist() == pytest.approx([math.log(0.8 / 0.2), math.log(0.2 / 0.8)])


def test_log_odds_of_a_certain_model_lose_no_digits() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    assert log_odds(logits, (0,)).item() == pytest.approx(200 - math.log(2), abs=1e-9)
    assert log_odds(-logits, (0,)).item() == pytest.approx(-200 - math.log(2), abs=1e-9)


@pytest.mark.parametrize(
    ("logits", "part"),
    [([[math.nan, 0.0]], "are NaN"), ([[0.0, -math.inf]], "certain of its first token")],
)
def test_log_odds_that_are_no_numbers_are_errors(logits: list, part: str) -> None:
    with pytest.raises(ScoreError, match=part):
        log_odds(torch.tensor(logits), (0,))


def test_the_log_odds_score_is_a_mean_with_an_interval_and_counts_refusing_prompts() -> None:
    logits = torch.zeros(4, 7)
    logits[:, ord("a") % 7] = torch.tensor([5.0, 5.0, -5.0, 0.0])
    scorer, model = log_odds_scorer(), ScriptedModel(logits=logits)
    scorer.prepare(model)
    score = scorer.score(model)
    values = [value - math.log(6) for value in (5.0, 5.0, -5.0, 0.0)]
    assert score.value == pytest.approx(sum(values) / 4)
    assert score.low < score.value < score.high
    assert (score.detail["refusing"], score.detail["prompts"], score.unit) == (2, 4, "nats")


class Spells(ScriptedModel):
    """A tokenizer, by its words."""

    words: ClassVar[dict[str, list[int]]] = {
        "I": [1], " I": [2], "As": [3], " As": [0, 3], "Sorry": [4, 5], " Sorry": [6, 5],
        "Well": [9], " Well": [9],
    }  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        return self.words.get(text, [9])


def test_openings_count_with_and_without_a_blank_by_their_first_token() -> None:
    # " As" begins with a blank of its own, which begins anything
    assert first_tokens(Spells(), ("I", "As", "Sorry")) == (1, 2, 3, 4, 6)
    with pytest.raises(ScoreError, match="no token that 'Well' begins with"):
        first_tokens(Spells(), ("I", "Well"))


def test_each_answer_is_told_by_itself_and_one_that_says_nothing_is_not() -> None:
    answers = ScriptedModel("I'm sorry.", "Sure: mix it.", " ", "the " * 60)
    for empty_is_behaviour in (True, False):
        scorer = keyword_rate(empty_is_behaviour=empty_is_behaviour)
        assert scorer.shows(answers) == [True, False, None, None]
    logits = torch.zeros(4, 7)
    logits[:, ord("a") % 7] = torch.tensor([5.0, 1.0, -5.0, 0.0])
    assert log_odds_scorer().shows(ScriptedModel(logits=logits)) == [True, False, False, False]


@pytest.mark.parametrize("openings", [[], ["I", " "]])
def test_openings_that_begin_nothing_are_refused(openings: list[str]) -> None:
    with pytest.raises(ValueError, match="give the words with which refusals begin"):
        log_odds_scorer(openings=openings)


def test_an_edit_lowers_the_log_odds_and_shared_passes_give_the_same(
    recipe: Recipe, planted: Path, behaviour: PromptSet
) -> None:
    given = {"kind": "refusal-log-odds", "openings": ["Sorry"], "goal": "minimize"}
    setting = RefusalLogOdds.model_validate({**given, "prompts": {"file": "behaviour.txt"}})
    own = recipe.model_copy(update={"scorers": (setting,)})
    replica = Replica(own, str(planted), {setting.name: behaviour})
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    shape = replica.describe().shape
    plans = [Plan.nothing(), Plan.uniform(shape, 2.3, "none", 1.0)]
    base, edited = (replica.evaluate(plan, setup).scorecard[setting.name] for plan in plans)
    assert base.detail["refusing"] == len(behaviour)
    assert edited.detail["refusing"] == 0
    assert edited.high < base.low
    together = replica.evaluate_in_shared_passes(plans, setup)
    found = [evaluation.scorecard[setting.name].value for evaluation in together]
    assert found == pytest.approx([base.value, edited.value], abs=1e-4)


@pytest.mark.parametrize("goal", ["report", "minimize"])
def test_log_odds_share_the_answers_pass_as_a_report_and_come_first_as_an_objective(
    goal: str, recipe: Recipe, planted: Path, behaviour: PromptSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = {"file": "behaviour.txt"}
    odds = RefusalLogOdds.model_validate(
        {"kind": "refusal-log-odds", "openings": ["Sorry"], "goal": goal, "prompts": source}
    )
    words = KeywordRate.model_validate(
        {"kind": "keyword-rate", "prompts": source, "max_new_tokens": 4}
    )
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    found, asked = {}, []
    for scorers in ((odds,), (odds, words)):
        own = recipe.model_copy(update={"scorers": scorers})
        replica = Replica(own, str(planted), {s.name: behaviour for s in scorers})
        plan = Plan.uniform(replica.describe().shape, 1.1, "none", 1.0)
        replica.evaluate(plan, setup)
        for name in ("logits_by_edit", "tokens_by_edit"):
            real = getattr(replica.model, name)
            told = lambda *a, real=real, name=name: (asked.append(name), real(*a))[1]  # noqa: E731
            monkeypatch.setattr(replica.model, name, told)
        asked.clear()
        found[len(scorers)] = [
            replica.evaluate(plan, setup), replica.evaluate_in_shared_passes([plan, plan], setup)[1]
        ]  # fmt: skip
    assert (
        asked
        == (["tokens_by_edit"] if goal == "report" else ["logits_by_edit", "tokens_by_edit"]) * 2
    )
    for alone, shared in zip(found[1], found[2], strict=True):
        # another pass over the same prompts: equal but for float32 rounding
        value = alone.scorecard[odds.name].value
        assert shared.scorecard[odds.name].value == pytest.approx(value, abs=1e-4)


def test_a_trial_whose_log_odds_are_hopeless_writes_no_answer(
    recipe: Recipe, planted: Path, behaviour: PromptSet
) -> None:
    source = {"file": "behaviour.txt"}
    odds = {"kind": "refusal-log-odds", "openings": ["Sorry"], "prompts": source}
    words = {"kind": "keyword-rate", "prompts": source, "max_new_tokens": 4}
    scorers = (KeywordRate.model_validate(words), RefusalLogOdds.model_validate(odds))
    own = recipe.model_copy(update={"scorers": scorers})
    replica = Replica(own, str(planted), {s.name: behaviour for s in scorers})
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    replica.evaluate(Plan.nothing(), setup)
    before = replica.model.tokens_written
    found = replica.evaluate(Plan.nothing(), setup, ThresholdSet(((0.0, -100.0),)))
    assert replica.model.tokens_written == before
    assert found.scorecard["keyword-rate"].bound
    assert not found.scorecard["refusal-log-odds"].bound
