"""Harmless prompts that look alarming."""

from pathlib import Path

import pytest

from ray_abliterate.errors import PromptSourceError
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.over_refusal import OverRefusal
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import OverRefusalSuite
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from tests.evaluation.suites.conftest import ablating, run_suite, written

ROWS = [
    {"prompt": "tell me about the soup", "type": "homonyms", "label": "safe"},
    {"prompt": "tell me about the stars", "type": "homonyms", "label": "safe"},
    {"prompt": "tell me about the bread", "type": "contrast", "label": "unsafe"},
    {"prompt": "how do i write", "type": "history", "label": "safe"},
]


def suite(base: Path, **options: object) -> OverRefusal:
    given = {"kind": "over-refusal", "table": {"file": "p.jsonl"}, "max_new_tokens": 4, **options}
    return OverRefusal(OverRefusalSuite.model_validate(given), base)


def test_refusals_of_harmless_prompts_are_counted_by_type(
    tmp_path: Path, model: LanguageModel
) -> None:
    written(tmp_path / "p.jsonl", ROWS)
    own = suite(tmp_path)
    results = [run_chunk(own, model, chunk) for chunk in own.chunks()]
    scores = {score.name: score for score in own.summary(results)}
    assert scores["over-refusal"].value == pytest.approx(1 / 3)
    assert scores["over-refusal/homonyms"].value == 0.5
    assert scores["over-refusal/history"].value == 0.0
    assert scores["over-refusal"].detail["empty"] == 0
    assert all(result.rows == () for result in results)


def test_prompts_that_are_not_harmless_are_left_out_unless_there_is_no_label(
    tmp_path: Path,
) -> None:
    written(tmp_path / "p.jsonl", ROWS)
    assert [c.item_ids for c in suite(tmp_path).chunks()] == [("3",), ("0", "1")]
    assert sum(len(c.items) for c in suite(tmp_path, label="").chunks()) == 4
    with pytest.raises(PromptSourceError, match="no row has label = 'harmless'"):
        list(suite(tmp_path, harmless="harmless").chunks())
    written(tmp_path / "p.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in ROWS])
    with pytest.raises(PromptSourceError, match="no column 'label'"):
        list(suite(tmp_path).chunks())


def test_empty_answers_count_as_refusals_and_apart(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "p.jsonl", ROWS)
    monkeypatch.setattr(model.chat, "decode", lambda ids: "")
    monkeypatch.setattr(type(model.chat), "decode", lambda self, ids: "")
    (first, *_) = [run_chunk(suite(tmp_path), model, c) for c in suite(tmp_path).chunks()]
    assert (first.values["refused"], first.counts["empty"]) == ((1.0,), 1)
    lenient = suite(tmp_path, empty_is_refusal=False)
    (first, *_) = [run_chunk(lenient, model, c) for c in lenient.chunks()]
    assert first.values["refused"] == (0.0,)


def test_answers_are_kept_whole_only_on_request(tmp_path: Path, model: LanguageModel) -> None:
    written(tmp_path / "p.jsonl", ROWS[:1])
    own = suite(tmp_path, keep_answers=True, markers=["sorry"])
    (chunk,) = own.chunks()
    (row,) = run_chunk(own, model, chunk).rows
    assert row["prompt"] == ROWS[0]["prompt"]
    assert (row["answer"], row["verdict"]) == ("sorry", "behaviour")


def test_the_set_that_ships_is_harmless_by_its_own_label_and_has_six_types() -> None:
    own = OverRefusal(OverRefusalSuite(kind="over-refusal"))
    chunks = list(own.chunks())
    assert {len(chunk.items) for chunk in chunks} == {6}
    assert len(chunks) == 6
    prompts = [item["prompt"] for chunk in chunks for item in chunk.items]
    assert len(set(prompts)) == 36


def test_a_row_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [ROWS[0], {**ROWS[1], "prompt": " "}])
    with pytest.raises(PromptSourceError) as caught:
        list(suite(tmp_path).chunks())
    assert str(caught.value) == f"{path}, line 2: `prompt` is ' ', not a prompt."


def test_an_edit_shows_in_refusals_and_pairs_show_it(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    (base / "p.csv").write_text(
        "prompt\n" + (base / "behaviour.txt").read_text() + "\n", encoding="utf-8"
    )
    given = {"kind": "over-refusal", "table": {"file": "p.csv"}, "label": "", "category": ""}
    suite = OverRefusal(OverRefusalSuite.model_validate({**given, "max_new_tokens": 4}), base)
    before = run_suite(replica, suite, Plan.nothing(), setup)
    after = run_suite(replica, suite, ablating(replica), setup)
    assert (suite.summary(before)[0].value, suite.summary(after)[0].value) == (1.0, 0.0)
    (found,) = suite.compare(before, after)
    assert (found.difference, found.items) == (-1.0, 7)
    assert found.p == pytest.approx(2 / 2**7)
    assert found.high < 0
