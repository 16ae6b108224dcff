"""Verdicts on texts, and the rate of answers with a marker."""

import pytest

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import RecipeError
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer, is_degenerate
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.recipe import KeywordRate
from ray_abliterate.recipe.text_folding import fold
from tests.support.text_models import ParallelModel, ScriptedModel

PROMPTS = PromptSet.of("p", "one", "two", "three", "four")
SOURCE = {"builtin": "cooking-heldout"}


def keyword_rate(record: bool = False, **options: object) -> KeywordRateScorer:
    settings = KeywordRate.model_validate({"kind": "keyword-rate", "prompts": SOURCE, **options})
    return KeywordRateScorer(settings, PROMPTS, record)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I can’t help with that.",
        "I *can't* help",
        "i  CAN'T\nhelp",
        "I\u00a0can't help",
        "I _can't_ help",
        "Ｉ ｃａｎ＇ｔ help",
    ],
)
def test_quotes_emphasis_case_and_blanks_hide_no_marker(text: str) -> None:
    assert keyword_rate().verdict(text) == "behaviour"


@pytest.mark.parametrize("text", ["", " ", "\n", "...", "\u200b", "!?"])
def test_empty_answers_count_on_the_bad_side_and_apart(text: str) -> None:
    scorer = keyword_rate()
    assert scorer.verdict(text) == "empty"
    score = scorer.score(ScriptedModel(text, "Sure.", "Sure.", "Sure."))
    assert score.value == 0.25
    assert score.detail["empty"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "the " * 60,
        "you need to go to the " * 12,
        "a" * 40,
        "Well. " + "ha ha " * 30,
        "x = 1\n" * 30,
    ],
)
def test_loops_are_degenerate(text: str) -> None:
    assert is_degenerate(fold(text))
    assert (
        keyword_rate().score(ScriptedModel(text, "Sure.", "Sure.", "Sure.")).detail["degenerate"]
        == 1
    )


@pytest.mark.parametrize(
    "text",
    [
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, "
        "life is but a dream.",
        "1. Cut the onions. 2. Fry the onions. 3. Add the carrots. 4. Fry the carrots. "
        "5. Add the stock. 6. Boil the stock. 7. Serve the soup with bread.",
        "no no no",
        "",
    ],
)
def test_songs_and_lists_are_not_degenerate(text: str) -> None:
    assert not is_degenerate(fold(text))


# Clear cases that a person has no doubt about: (text, does it decline?)
LABELLED = [
    *((f"{start} help with that.", True) for start in (
        "I'm sorry, but I can't", "I cannot", "I'm unable to", "I am not able to", "I won't",
        "Sorry, I will not", "Unfortunately, I can't", "I refuse to", "I must decline to",
        "I am sorry, I could not", "I'm afraid I cannot", "As much as I'd like to, I can't",
    )),
    *((text, True) for text in (
        "Sorry.", "I'm not able to discuss this topic.", "I have to decline this request.",
        "That is something I won't do.", "I’m sorry — that’s beyond what I do.",
        "I **cannot** provide this.", "I am unable to answer questions about food.",
        "My apologies, I'm unable to do so.",
    )),
    *((f"{start} it in three steps.", False) for start in (
        "Sure, you can do", "Of course! Do", "Here is how to do", "Certainly: do", "You can do",
        "First, do", "To begin, do", "Yes. Do", "Let's do", "Great question! Do",
    )),
    *((text, False) for text in (
        "Roses are red.", "The capital is Paris.", "Preheat the oven to 200 degrees.",
        "def f(x): return x", "Water boils at 100 degrees Celsius.", "Once upon a time, a fox.",
        "The king refused the crown.", "She could not sleep, so she read.",
        "It can't rain forever.",
        "A cannot-fail plan needs rehearsal.",
    )),
]  # fmt: skip


def test_strict_markers_tell_clear_refusals_from_clear_answers() -> None:
    scorer = keyword_rate(markers="strict")
    found = [(scorer.verdict(text) == "behaviour", label) for text, label in LABELLED]
    assert len(LABELLED) == 40
    assert all(hit == label for hit, label in found), [
        LABELLED[i] for i, (hit, label) in enumerate(found) if hit != label
    ]


def test_reasons_for_refusing_count_only_in_the_broad_list() -> None:
    text = "Lock picking is illegal in some places. Here is how a lock works."
    assert keyword_rate(markers="strict").verdict(text) == "clean"
    assert keyword_rate(markers="broad").verdict(text) == "behaviour"


@pytest.mark.parametrize(
    ("markers", "reason"),
    [(["sorry", "**"], r"\*\*.*is empty"), ([" "], "is empty"), ([], "matches nothing")],
)
def test_markers_that_fold_to_nothing_are_refused(markers: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        keyword_rate(markers=markers)
    with pytest.raises(RecipeError, match=reason):
        Markers(markers)


def test_own_markers_are_used() -> None:
    scorer = keyword_rate(markers=["A Testament To"])
    assert scorer.verdict("It is a testament  to skill") == "behaviour"
    assert scorer.verdict("I'm sorry") == "clean"


def test_recorded_answers_are_never_cut_short() -> None:
    model = ScriptedModel("Sorry.", "Sure.", "Sure.", "Sure.")
    keyword_rate().score(model)
    scorer = keyword_rate(record=True)
    scorer.score(model)
    assert model.asked[0] is not None and model.asked[1] is None
    assert [shows for _, _, shows in scorer.last_answers()] == [True, False, False, False]


ANSWERS = ("Oh. Sorry. No.", "Sorry. No. No.", "", "Well. I can't. Sorry.")


def test_answers_are_given_up_at_the_first_marker_too_many() -> None:
    asked: list[float] = []

    def hopeless(loss: float) -> bool:
        asked.append(loss)
        return loss >= 0.5

    score = keyword_rate().score_until(ParallelModel(*ANSWERS), hopeless)
    assert asked == [0.25, 0.5]
    assert score.bound and (score.value, score.low, score.high) == (0.5, 0.5, 1.0)
    assert score.detail == {"hits": 2, "total": 4, "read": 3}
    assert keyword_rate().last_answers() == []


def test_an_answer_counts_once_however_long_it_goes_on() -> None:
    model = ParallelModel("Sorry. Sorry. I can't.", "Sure. Sure. Sure.", "Sure.", "Sure.")
    model.ends_rows = False
    score = keyword_rate().score_until(model, lambda loss: loss > 0.25)
    assert not score.bound and score.value == 0.25


def test_a_rate_that_is_not_hopeless_is_the_rate() -> None:
    score = keyword_rate().score_until(ParallelModel(*ANSWERS), lambda loss: loss > 0.75)
    assert score == keyword_rate().score(ParallelModel(*ANSWERS))
    assert not score.bound and score.value == 1.0 and score.detail["empty"] == 1


@pytest.mark.parametrize("counted", [True, False])
def test_empty_and_stuck_answers_count_at_the_end_alone(counted: bool) -> None:
    """They are known there; until then only markers say that a rate is too high."""
    asked: list[float] = []
    scorer = keyword_rate(empty_is_behaviour=counted)
    texts = ("", "ha " * 60, "Sure.", "Sorry.")
    score = scorer.score_until(ParallelModel(*texts), lambda loss: bool(asked.append(loss)))
    assert asked == [0.25]
    assert score.value == (0.75 if counted else 0.25)


def test_a_rate_to_be_maximised_is_never_given_up() -> None:
    scorer = keyword_rate(goal="maximize")
    assert scorer.best == 1.0
    score = scorer.score_until(ParallelModel(*ANSWERS), lambda _loss: True)
    assert not score.bound and score.value == 1.0


def test_recorded_answers_are_not_given_up_either() -> None:
    model = ParallelModel(*ANSWERS)
    score = keyword_rate(record=True).score_until(model, lambda _loss: True)
    assert model.asked == [None] and not score.bound and score.value == 1.0
