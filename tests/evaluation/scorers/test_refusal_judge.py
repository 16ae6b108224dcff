"""The share of refusals, as a second model judges."""

import pytest

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.refusal_judge import RefusalJudgeScorer
from ray_abliterate.model.text_model import Answer
from ray_abliterate.recipe import RefusalJudge
from tests.support.judges import StubJudge, StubPrefetchingJudge
from tests.support.text_models import SequentialModel

SOURCE = {"builtin": "cooking-heldout"}
PROMPTS = PromptSet.of("p", "one", "two", "three", "four")


def judge_scorer(judge: StubJudge, **options: object) -> RefusalJudgeScorer:
    given = {"kind": "refusal-judge", "prompts": SOURCE, "classifier": "x", "label": "y"}
    return RefusalJudgeScorer(RefusalJudge.model_validate({**given, **options}), PROMPTS, judge)


def test_what_the_judge_can_not_tell_is_in_no_denominator() -> None:
    judge = StubJudge({"no way": 0.9, "here": 0.2, "hm": None, "maybe": 0.5})
    scorer = judge_scorer(judge)
    score = scorer.score(SequentialModel("no way", "here", "hm", "maybe"))
    assert score.value == pytest.approx(2 / 3)
    assert (score.detail["unknown"], score.detail["total"]) == (1, 3)
    assert [shows for *_, shows in scorer.last_answers()] == [True, False, True]
    score = judge_scorer(judge, threshold=0.6).score(
        SequentialModel("no way", "here", "hm", "maybe")
    )
    assert score.value == pytest.approx(1 / 3)


def test_broken_answers_are_not_shown_to_the_judge_and_are_no_success() -> None:
    judge = StubJudge({"here": 0.1})
    texts = ("", "ha " * 40, "here", "...")
    score = judge_scorer(judge).score(SequentialModel(*texts))
    assert (score.value, score.detail["empty or degenerate"]) == (0.75, 3)
    assert judge.asked == ["here"]
    score = judge_scorer(judge, empty_is_refusal=False).score(SequentialModel(*texts))
    assert (score.value, score.detail["unknown"]) == (0.0, 3)


@pytest.mark.parametrize("empty_is_refusal", [True, False])
def test_each_answer_is_judged_by_itself_and_a_broken_one_is_not(empty_is_refusal: bool) -> None:
    judge = StubJudge({"no way": 0.9, "here": 0.2, "hm": None})
    scorer = judge_scorer(judge, empty_is_refusal=empty_is_refusal)
    assert scorer.shows(SequentialModel("no way", "here", "hm", "")) == [True, False, None, None]


def test_a_judge_that_can_tell_nothing_is_an_error() -> None:
    with pytest.raises(ScoreError, match="can't decide on any of 4 answers"):
        judge_scorer(StubJudge({"hm": None})).score(SequentialModel("hm", "hm", "hm", "hm"))


def test_a_broken_answer_is_not_sent_to_a_judge_elsewhere() -> None:
    judge = StubPrefetchingJudge(0.0)
    scorer = judge_scorer(judge)
    for text in ("", "ha " * 40, "here"):
        scorer.on_answer(Prompt("one"), Answer(text, 3, False))
    assert [text for text, _ in judge.expected] == ["here"]
