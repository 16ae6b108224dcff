"""Precision and recall of a judge on labelled texts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_abliterate.cli.app import app
from ray_abliterate.errors import PromptSourceError, ScoreError
from ray_abliterate.evaluation.judges.calibration import (
    calibrate,
    precision_recall,
    read_labelled_texts,
)
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.recipe import Recipe
from tests.support.classifiers import tiny_classifier
from tests.support.judges import StubJudge

KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Tiny classifiers by their labels."""

    def make(*labels: str, kind: str | None = None) -> str:
        return tiny_classifier(tmp_path_factory.mktemp("classifier"), *labels, kind=kind)

    return make


def recipe_with(text: str) -> Recipe:
    head = '[model]\nname = "planted"\n[prompts]\n' + "".join(
        f'{kind} = {{ builtin = "cooking-train" }}\n' for kind in ("behaviour", "neutral")
    )
    scorers = '[[scorers]]\nkind = "keyword-rate"\nprompts = { builtin = "cooking-heldout" }\n'
    judge = '[[scorers]]\nkind = "refusal-judge"\nprompts = { builtin = "cooking-heldout" }\n'
    return Recipe.parse(head + scorers + judge + text, "recipe.toml")


def test_the_curve_is_precision_and_recall_at_every_threshold() -> None:
    curve = precision_recall([0.9, 0.8, 0.8, 0.3, 0.1], [True, True, False, True, False])
    assert [(p.threshold, p.precision, p.recall) for p in curve] == [
        (0.9, 1.0, 1 / 3), (0.8, 2 / 3, 2 / 3), (0.3, 3 / 4, 1.0), (0.1, 3 / 5, 1.0),
    ]  # fmt: skip
    with pytest.raises(ScoreError, match="0 of 1 judged texts are refusals"):
        precision_recall([0.5], [False])


def test_calibration_finds_the_best_threshold_and_holds_the_markers_against_it() -> None:
    opinions = {
        "sorry no": 0.9,
        "not today": 0.7,
        "sorry, here it is": 0.6,
        "here": 0.1,
        "hm": None,
    }
    truth = {"sorry no": True, "not today": True, "sorry, here it is": False, "here": False}
    texts = [(("", text), label) for text, label in {**truth, "hm": True}.items()]
    found = calibrate(StubJudge(opinions), texts, {"own": Markers(["sorry"]).in_text})
    assert (found.best.threshold, found.best.precision, found.best.recall) == (0.7, 1.0, 1.0)
    assert (found.texts, found.unknown) == (5, 1)
    own = found.markers["own"]
    assert (own.precision, own.recall) == (0.5, 1 / 3)
    lines = found.lines()
    assert any("0.7000" in line and "best F1" in line for line in lines)
    assert lines[-1] == "threshold = 0.7000"


def test_labels_are_words_or_truths_and_others_are_named_with_their_line(tmp_path: Path) -> None:
    labels = ["refusal", "Answer", True, False, 1, 0]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in labels))
    assert [label for _, label in read_labelled_texts(path)] == [True, False] * 3
    path.write_text('{"text": "x", "label": "refusal"}\n{"text": "x", "label": "no"}\n')
    with pytest.raises(PromptSourceError, match=r"line 2: `label` is 'no'"):
        list(read_labelled_texts(path))
    with pytest.raises(PromptSourceError, match="no column 'prompt'"):
        list(read_labelled_texts(path, with_prompts=True))


def test_the_command_prints_the_curve(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "planted"\n[prompts]\nbehaviour = { builtin = "cooking-train" }\n'
        'neutral = { builtin = "other-train" }\n[[scorers]]\nkind = "refusal-judge"\n'
        'goal = "minimize"\nprompts = { builtin = "cooking-heldout" }\n'
        f'classifier = "{made("answer", "refusal")}"\nlabel = "refusal"\n'
    )
    rows = [("I cannot help", "refusal"), ("Sure here it is", "answer"), ("Sorry no", "refusal")]
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows)
    )
    done = CliRunner().invoke(
        app, ["calibrate", str(tmp_path / "r.toml"), str(tmp_path / "l.jsonl")]
    )
    assert done.exit_code == 0, done.output
    assert "3 texts, 2 of them refusals; 0 unknown" in done.output
    assert "strict" in done.output
    assert "threshold = " in done.output
