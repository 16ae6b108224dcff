"""Judgements on disk: each exchange is judged once."""

from pathlib import Path

import pytest

from ray_abliterate.evaluation.judges.cache import CachedJudge
from tests.support.judges import StubJudge


def test_a_judgement_is_asked_for_once_and_an_unknown_one_again(tmp_path: Path) -> None:
    inner = StubJudge({"a": 0.25, "b": None, "c": 1.0})
    exchanges = [("p", "a"), ("p", "b"), ("p", "a"), ("p", "c")]
    assert CachedJudge(inner, tmp_path).judge(exchanges) == [0.25, None, 0.25, 1.0]
    assert inner.asked == ["a", "b", "c"]
    assert CachedJudge(inner, tmp_path).judge(exchanges) == [0.25, None, 0.25, 1.0]
    assert inner.asked == ["a", "b", "c", "b"]


def test_another_judge_or_prompt_is_another_judgement(tmp_path: Path) -> None:
    inner = StubJudge({"a": 0.25})
    CachedJudge(inner, tmp_path).judge([("p", "a")])
    CachedJudge(inner, tmp_path).judge([("q", "a")])
    CachedJudge(StubJudge({"a": 0.5}, "two"), tmp_path).judge([("p", "a")])
    assert inner.asked == ["a", "a"]
    assert CachedJudge(inner, tmp_path).judge([("p", "a")]) == [0.25]
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_a_damaged_judgement_is_asked_for_again(tmp_path: Path) -> None:
    inner = StubJudge({"a": 0.25})
    for damage in ("", "{", "7", '"a"', "null"):
        CachedJudge(inner, tmp_path).judge([("p", "a")])
        (file,) = tmp_path.rglob("*.json")
        file.write_text(damage)
    assert CachedJudge(inner, tmp_path).judge([("p", "a")]) == [0.25]
    assert inner.asked == ["a"] * 6


def test_what_was_judged_before_a_failure_is_kept(tmp_path: Path) -> None:
    inner = StubJudge({str(n): 0.5 for n in range(70)})
    exchanges = [("p", str(n)) for n in range(71)]
    with pytest.raises(KeyError):
        CachedJudge(inner, tmp_path).judge(exchanges)
    assert len(list(tmp_path.rglob("*.json"))) == 64
