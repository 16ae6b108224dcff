"""Questions, the errors in them, and how their choices are scored."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.errors import PromptSourceError, ScoreError
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.multiple_choice import (
    MultipleChoice,
    letter_tokens,
    text_scores,
)
from ray_abliterate.evaluation.suites.multiple_choice_prompt import letter_prompt, text_prompt
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import MultipleChoiceSuite
from tests.evaluation.suites.conftest import questions, written


def suite(base: Path, file: str = "q.jsonl", **options: object) -> MultipleChoice:
    given = {"kind": "multiple-choice", "table": {"file": file}, **options}
    return MultipleChoice(MultipleChoiceSuite.model_validate(given), base)


def asked(suite: MultipleChoice) -> list[tuple[str, tuple[str, ...]]]:
    return [(chunk.id, chunk.item_ids) for chunk in suite.chunks()]


# What is asked


def test_chunks_are_of_one_category_and_come_as_soon_as_they_are_full(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", questions("stars", "soup", each=5))
    assert asked(suite(tmp_path, chunk=2)) == [
        ("stars/00000", ("0", "1")),
        ("stars/00001", ("2", "3")),
        ("soup/00000", ("5", "6")),
        ("soup/00001", ("7", "8")),
        ("soup/00002", ("9",)),
        ("stars/00002", ("4",)),
    ]


def test_so_many_of_each_category_and_so_many_in_all(tmp_path: Path) -> None:
    mixed = questions("stars", "soup", "bread", each=5)
    mixed = mixed[::2] + mixed[1::2]
    written(tmp_path / "q.jsonl", mixed)
    found = {chunk.group: len(chunk.items) for chunk in suite(tmp_path, samples_per_category=3).chunks()}  # fmt: skip # noqa: E501
    assert found == {"stars": 3, "soup": 3, "bread": 3}
    assert sum(len(ids) for _, ids in asked(suite(tmp_path, limit=4))) == 4
    only = suite(tmp_path, categories=["soup"], samples_per_category=2)
    assert [name for name, _ in asked(only)] == ["soup/00000"]


def test_categories_that_no_question_has_are_an_error(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", questions("stars"))
    with pytest.raises(
        PromptSourceError, match=r"no question of these categories\.\n  Check `categ"
    ):
        asked(suite(tmp_path, categories=["soups"]))


def test_nothing_is_read_behind_the_last_question_that_is_asked(tmp_path: Path) -> None:
    rows = [*questions("stars", "soup"), {"question": "broken"}]
    written(tmp_path / "q.jsonl", rows)
    assert len(asked(suite(tmp_path, limit=6))) == 2
    assert len(asked(suite(tmp_path, categories=["stars"], samples_per_category=2))) == 1
    with pytest.raises(PromptSourceError):
        asked(suite(tmp_path))


@pytest.mark.parametrize("answer", [2, "C", "c", " C ", "2"])
def test_the_right_answer_is_a_place_or_a_letter(tmp_path: Path, answer: object) -> None:
    written(tmp_path / "q.jsonl", [{**questions("stars")[0], "answer": answer}])
    (chunk,) = suite(tmp_path).chunks()
    assert chunk.items[0]["answer"] == 2


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("answer", 4, "`answer` is 4; the right answer is a number from 0 to 3, or a letter"),
        ("answer", -1, "`answer` is -1;"),
        ("answer", "E", "or a letter from A to D."),
        ("answer", None, "`answer` is None;"),
        ("answer", True, "`answer` is True;"),
        ("answer", "", "`answer` is '';"),
        ("answer", 1.5, "`answer` is 1.5;"),
        ("choices", ["one"], "`choices` is ['one'], not a list of 2 to 26 texts."),
        ("choices", "one, two", "`choices` is 'one, two', not a list"),
        ("choices", ["one", None], "`choices` is ['one', None]"),
        ("choices", ["one", " "], "`choices` is ['one', ' ']"),
        ("question", "", "`question` is '', not a question."),
        ("question", None, "`question` is None"),
        ("subject", 3, "`subject` is 3, not the name of a category."),
    ],
)
def test_an_impossible_row_is_named_with_file_line_and_field(
    tmp_path: Path, field: str, value: object, part: str
) -> None:
    rows = questions("stars")
    rows[2] = {**rows[2], field: value}
    path = written(tmp_path / "q.jsonl", rows)
    with pytest.raises(PromptSourceError) as caught:
        asked(suite(tmp_path))
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert part in str(caught.value)


def test_results_before_an_impossible_row_are_kept(tmp_path: Path, model: LanguageModel) -> None:
    rows = questions("stars", "soup")
    del rows[6]["answer"]
    written(tmp_path / "q.jsonl", rows)
    own, results = suite(tmp_path, chunk=2), []
    with pytest.raises(PromptSourceError, match=r"line 7: `answer` is None"):
        for chunk in own.chunks():
            results.append(run_chunk(own, model, chunk))
    assert [result.chunk for result in results] == ["stars/00000", "stars/00001", "soup/00000"]
    assert own.summary(results)[0].detail["items"] == 6


def test_a_table_in_another_layout_is_named_by_its_columns(tmp_path: Path) -> None:
    rows = [{**row, "topic": row["subject"]} for row in questions("stars")]
    for row in rows:
        del row["subject"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    with pytest.raises(PromptSourceError, match="no column 'subject'"):
        asked(suite(tmp_path, "q.parquet"))
    named = suite(tmp_path, "q.parquet", category="topic")
    assert asked(named)[0][0] == "stars/00000"
    assert asked(suite(tmp_path, "q.parquet", category=""))[0][0] == "00000"


def test_memory_is_that_of_one_chunk_of_each_category(tmp_path: Path) -> None:
    def peak(each: int) -> int:
        rows = [
            {**q, "question": q["question"] + "x" * 2000} for q in questions("a", "b", each=each)
        ]
        written(tmp_path / "q.jsonl", rows)
        del rows
        tracemalloc.start()
        for _ in suite(tmp_path, chunk=8).chunks():
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(2000) < 1.2 * peak(200) + 20_000


# Examples


def test_examples_are_shown_as_documented() -> None:
    example = {"question": " which one ", "choices": ["x", "y"], "answer": 1}
    item = {**ITEM, "examples": [example, {**example, "question": "or", "answer": 0}]}
    assert letter_prompt(item).user == (
        "Choose the right answer to the question. Reply with its letter alone.\n\n"
        "which one\nA. x\nB. y\nAnswer: B\n\n"
        "or\nA. x\nB. y\nAnswer: A\n\n"
        "which\nA. x\nB. y\nC. z\nAnswer:"
    )
    assert text_prompt(item).user == "which one\ny\n\nor\nx\n\nwhich"


def shown(suite: MultipleChoice) -> dict[str, list[str]]:
    """Questions that are asked, each with the questions of its examples."""
    return {
        item["question"]: [example["question"] for example in item["examples"]]
        for chunk in suite.chunks()
        for item in chunk.items
    }


def test_without_a_table_of_examples_the_first_of_each_category_are_set_apart(
    tmp_path: Path,
) -> None:
    rows = questions("stars", "soup", each=4)
    twice = {**rows[0], "question": "what  is stars 0 "}  # an example again
    written(tmp_path / "q.jsonl", [*rows[::2], twice, *rows[1::2]])
    assert shown(suite(tmp_path, shots=2)) == {
        "what is stars 1": ["what is stars 0", "what is stars 2"],
        "what is stars 3": ["what is stars 0", "what is stars 2"],
        "what is soup 1": ["what is soup 0", "what is soup 2"],
        "what is soup 3": ["what is soup 0", "what is soup 2"],
    }
    assert len(shown(suite(tmp_path, shots=2, samples_per_category=1))) == 2


def test_examples_of_another_table_are_never_the_question(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", questions("stars", "soup", each=3))
    written(tmp_path / "dev.jsonl", questions("soup", "stars", "bread", each=5))
    found = shown(suite(tmp_path, shots=2, examples={"file": "dev.jsonl"}))
    assert found["what is stars 0"] == ["what is stars 1", "what is stars 2"]
    assert found["what is stars 1"] == ["what is stars 0", "what is stars 2"]
    assert found["what is soup 2"] == ["what is soup 0", "what is soup 1"]
    assert len(found) == 6


def test_a_category_with_too_few_examples_is_named(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", questions("stars", "soup", each=3))
    written(tmp_path / "dev.jsonl", [*questions("stars", each=4), *questions("soup", each=2)])
    few = {"shots": 2, "examples": {"file": "dev.jsonl"}}
    with pytest.raises(PromptSourceError, match=r"'soup' has 1 examples, and shots = 2\.\n  Lower"):
        shown(suite(tmp_path, **few))
    assert len(shown(suite(tmp_path, **few, categories=["stars"]))) == 3


def test_an_impossible_example_is_named_too(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", questions("stars"))
    written(tmp_path / "dev.jsonl", [*questions("stars"), {"question": "broken"}])
    with pytest.raises(PromptSourceError, match=r"dev.jsonl, line 5: `choices` is None"):
        shown(suite(tmp_path, shots=1, examples={"file": "dev.jsonl"}))


def test_examples_change_what_a_model_says(tmp_path: Path, model: LanguageModel) -> None:
    written(tmp_path / "q.jsonl", questions("stars", each=5))
    few, none = suite(tmp_path, shots=3), suite(tmp_path)
    asked = next(iter(few.chunks())).items[0]
    again = next(
        item for chunk in none.chunks() for item in chunk.items if item["id"] == asked["id"]
    )
    logits = model.next_token_logits([letter_prompt(asked), letter_prompt(again)])
    assert not torch.equal(logits[0], logits[1])


# How it is scored


class Tells:
    """A model whose logits are given, over a vocabulary of letters and words."""

    def __init__(self, logits: torch.Tensor, spelt: dict[str, list[int]]) -> None:
        self.logits, self.spelt = logits, spelt
        self.asked: list[Sequence[Prompt]] = []

    def tokens(self, text: str) -> list[int]:
        return self.spelt[text]

    def next_token_logits(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        self.asked.append(prompts)
        return self.logits

    def continuation_logits(self, prompts: Sequence[Prompt], continuations: list) -> list:
        self.asked.append(prompts)
        return [self.logits[0].repeat(len(ids), 1) for ids in continuations]

    def answer(self, *_: object) -> list:
        return []

    continue_greedily = sample = unedited = answer


BLANKS = {" A": [4], " B": [5], " C": [6, 1], "A": [0], "B": [1], "C": [2]}
ITEM = {"id": "0", "question": "which", "choices": ["x", "y", "z"], "answer": 1}


def test_a_letter_counts_with_and_without_a_blank_before_it(tmp_path: Path) -> None:
    # B and " B" together are likelier than A, and than C
    logits = torch.log(torch.tensor([[0.30, 0.20, 0.10, 0.05, 0.01, 0.24, 0.10]]))
    model = Tells(logits, BLANKS)
    own = suite(tmp_path)
    chunk = next(iter(_chunks(own, [ITEM], tmp_path)))
    found = own.run(model, chunk)
    assert found.values["correct"] == (1.0,)
    assert found.values["letter-mass"][0] == pytest.approx(0.85)
    text = model.asked[0][0].user
    assert "which\nA. x\nB. y\nC. z\nAnswer:" in text


def _chunks(own: MultipleChoice, items: list[dict], base: Path):
    rows = [{**item, "subject": "s"} for item in items]
    written(base / "q.jsonl", rows)
    return own.chunks()


def test_letters_without_tokens_of_their_own_are_refused() -> None:
    logits = torch.zeros(1, 7)
    for spelt in ({**BLANKS, "B": [0]}, {**BLANKS, "C": [3, 2]}):
        with pytest.raises(ScoreError, match='Set scoring = "text"'):
            letter_tokens(Tells(logits, spelt), 3)


def test_a_text_is_scored_by_its_bytes_so_that_long_ones_have_a_chance() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.4, 0.1]]))
    spelt = {"x": [1], "yyyy": [0, 0], "zé": [2]}
    item = {**ITEM, "choices": list(spelt)}
    (scores,) = text_scores(Tells(logits, spelt), [item])
    expected = [torch.tensor(p).log().item() for p in (0.4, 0.25, 0.1)]
    assert scores == pytest.approx([expected[0], expected[1] / 4, expected[2] / 3])
    assert max(range(3), key=scores.__getitem__) == 1


def test_few_answers_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_abliterate.evaluation.suites.multiple_choice.TOKENS_AT_ONCE", 4)
    model = Tells(torch.zeros(1, 3), {"x": [1], "y": [0, 0], "z": [2] * 6})
    scores = text_scores(model, [{**ITEM, "choices": list("xyz")}] * 3)
    assert len(scores) == 3
    assert [len(prompts) for prompts in model.asked] == [2, 1, 2, 1, 2, 1]


def test_broken_logits_are_an_error_and_not_a_guess(tmp_path: Path) -> None:
    own = suite(tmp_path)
    chunk = next(iter(_chunks(own, [ITEM], tmp_path)))
    with pytest.raises(ScoreError, match="are NaN"):
        own.run(Tells(torch.full((1, 7), torch.nan), BLANKS), chunk)


@pytest.mark.parametrize("scoring", ["letters", "text"])
def test_a_real_models_choice_is_the_one_its_probabilities_say(
    tmp_path: Path, model: LanguageModel, scoring: str
) -> None:
    rows = questions("stars", "soup")
    written(tmp_path / "q.jsonl", rows)
    own = suite(tmp_path, scoring=scoring, chunk=3)
    results = [run_chunk(own, model, chunk) for chunk in own.chunks()]
    right = {i: v for r in results for i, v in zip(r.items, r.values["correct"], strict=True)}
    tokenizer = model.chat.tokenizer
    for number, row in enumerate(rows):
        item = {"id": "", **row}
        if scoring == "letters":
            logits = model.next_token_logits([letter_prompt(item)])[0]
            values = [logits[tokenizer.convert_tokens_to_ids(c)].item() for c in "abcd"]
        else:
            prompt = Prompt(row["question"])
            values = []
            for text in row["choices"]:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                logs = model.continuation_logits([prompt], [ids])[0].log_softmax(-1)
                total = sum(logs[place, token].item() for place, token in enumerate(ids))
                values.append(total / len(text))
        assert right[str(number)] == (values.index(max(values)) == row["answer"])
    assert 0 < sum(right.values()) < len(rows)
