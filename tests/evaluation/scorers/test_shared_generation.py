"""Answers that several scorers read are generated once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
)

from ray_abliterate.data.builtin.planted_model import planted_axes
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.evaluation.scorers.refusal_judge import RefusalJudgeScorer
from ray_abliterate.evaluation.scorers.shared_generation import share_generation
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import KeywordRate, ModelSettings, Recipe, RefusalJudge
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from ray_abliterate.testing.tiny import tiny_model
from tests.support.classifiers import tiny_classifier
from tests.support.judges import StubJudge, StubPrefetchingJudge
from tests.support.text_models import SequentialModel

SOURCE = {"builtin": "cooking-heldout"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Tiny classifiers by their labels."""

    def make(*labels: str, kind: str | None = None) -> str:
        return tiny_classifier(tmp_path_factory.mktemp("classifier"), *labels, kind=kind)

    return make


PROMPTS = PromptSet.of("p", "one", "two", "three", "four")


def judge_scorer(judge: StubJudge, **options: object) -> RefusalJudgeScorer:
    given = {"kind": "refusal-judge", "prompts": SOURCE, "classifier": "x", "label": "y"}
    return RefusalJudgeScorer(RefusalJudge.model_validate({**given, **options}), PROMPTS, judge)


def keyword_scorer(**options: object) -> KeywordRateScorer:
    given = {"kind": "keyword-rate", "prompts": SOURCE, "markers": ["sorry"], **options}
    return KeywordRateScorer(KeywordRate.model_validate(given), PROMPTS)


TEXTS = ("sorry but here it is", "here it is", "no I would rather not", "here")


@pytest.mark.parametrize("first", ["keyword", "judge"])
def test_both_scorers_read_one_generation_and_score_as_they_would_alone(first: str) -> None:
    judge = StubJudge(dict.fromkeys(TEXTS, 0.0) | {TEXTS[2]: 1.0})
    scorers = [keyword_scorer(), judge_scorer(judge)]
    alone = [scorer.score(SequentialModel(*TEXTS)) for scorer in scorers]
    model = SequentialModel(*TEXTS)
    view = share_generation(scorers, model)
    order = scorers if first == "keyword" else list(reversed(scorers))
    together = {scorer.name: scorer.score(view) for scorer in order}
    assert [together[scorer.name] for scorer in scorers] == alone
    assert model.written == len(" ".join(TEXTS).split())


def test_answers_of_another_length_or_alone_are_not_shared() -> None:
    judge = StubJudge(dict.fromkeys(TEXTS, 0.0))
    model = SequentialModel(*TEXTS)
    assert share_generation([keyword_scorer()], model) is model
    scorers = [keyword_scorer(max_new_tokens=7), judge_scorer(judge)]
    view = share_generation(scorers, model)
    for scorer in scorers:
        scorer.score(view)
    assert model.written == 1 + 3 + 5 + 1 + len(" ".join(TEXTS).split())


def test_a_lost_trial_still_ends_early_and_its_answers_are_forgotten() -> None:
    judge = StubJudge(dict.fromkeys(TEXTS, 0.0))
    scorer, model = keyword_scorer(), SequentialModel(*TEXTS)
    view = share_generation([scorer, judge_scorer(judge)], model)
    assert scorer.score_until(view, lambda loss: loss > 0).bound
    assert model.written == 1
    assert judge_scorer(judge).score(view).detail["total"] == 4


def test_a_replica_writes_answers_once_for_both_scorers(
    made, recipe: Recipe, planted: Path, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    prompts = {"prompts": {"file": "behaviour.txt"}, "max_new_tokens": 4}
    keywords = KeywordRate.model_validate({"kind": "keyword-rate", **prompts})
    given = {"kind": "refusal-judge", "classifier": made("answer", "refusal"), "label": "refusal"}
    judged = RefusalJudge.model_validate({**given, **prompts})
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    found = {}
    for scorers in ((keywords,), (judged,), (keywords, judged)):
        own = recipe.model_copy(update={"scorers": scorers})
        replica = Replica(own, str(planted), {s.name: behaviour for s in scorers})
        plan = Plan.uniform(replica.describe().shape, 2.3, "none", 1.0)
        alone, together = (
            replica.evaluate(plan, setup),
            replica.evaluate_in_shared_passes([plan], setup),
        )
        assert alone.scorecard == together[0].scorecard
        found[len(scorers), scorers[0].kind] = alone
    both = found[2, "keyword-rate"]
    assert both.tokens == found[1, "refusal-judge"].tokens
    for kind in ("keyword-rate", "refusal-judge"):
        assert both.scorecard[kind] == found[1, kind].scorecard[kind]


class Steps:
    """A watch that ends nothing, and counts how often it is asked whether to go on."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, index: int) -> None: ...

    def read(self, index: int, text: str) -> bool:
        return False

    def enough(self) -> bool:
        self.count += 1
        return False


def rambling(family: str, planted: Path) -> LanguageModel:
    """A random model, one of whose answers ends sooner than the others."""
    tokenizer = AutoTokenizer.from_pretrained(planted)
    rows = {prompt: [5 * i + 3, 7 * i + 1, 40 - i] for i, prompt in enumerate(PROMPTS.prompts)}

    def model(end: int) -> LanguageModel:
        module = tiny_model(family)
        module.generation_config.eos_token_id = [end]
        found = LanguageModel(module, tokenizer, ModelSettings(name="m"))
        found.encode = lambda prompts: [rows[prompt] for prompt in prompts]
        return found

    rows_said = model(2).continue_greedily(PROMPTS.prompts, 12)
    return model(
        next(
            token
            for said in rows_said
            for token in said[3:]
            if token not in said[:3] and any(token not in other for other in rows_said)
        )
    )


@pytest.mark.parametrize("family", ["llama", "mamba"])  # the engine, and transformers' generation
def test_a_judge_elsewhere_has_the_first_answer_before_the_last_is_written(
    family: str, planted: Path
) -> None:
    model, steps, judge = rambling(family, planted), Steps(), StubPrefetchingJudge(1.0)
    assert bool(model.not_packable) == (family == "mamba")
    whole = model.answer(PROMPTS.prompts, 12)
    assert len({answer.tokens for answer in whole}) > 1
    judge.written = lambda: steps.count
    scorer = judge_scorer(judge, max_new_tokens=12)
    view = share_generation([scorer], model)
    assert view.answer(PROMPTS.prompts, 12, steps) == whole
    told = [text for text, _ in judge.expected]
    assert sorted(told) == sorted(answer.text for answer in whole if answer.text)
    times = [time for _, time in judge.expected]
    assert times[0] < times[-1]
    assert scorer.score(view).detail["total"] == len(PROMPTS)
    assert len(judge.expected) == len(told)
