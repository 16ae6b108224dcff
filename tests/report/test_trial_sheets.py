"""What the page puts side by side: cards of the knee, and the sheets that any two trials have."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.report.trial_sheets import strip
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.score import Score
from tests.support.report_runs import (
    BASE,
    LAYERS,
    TWO,
    Page,
    card,
    divergence,
    length,
    make,
    page,
    rate,
    recipe,
    stopped,
)


def sheets(parsed: Page) -> Any:
    return json.loads(parsed.texts("script", id="sheets")[0])


def cells(parsed: Page, key: str) -> dict[str, Any]:
    """A model's cells by the field's name."""
    found = sheets(parsed)
    (model,) = [model for model in found["models"] if model["key"] == key]
    names = [field["name"] for field in found["fields"]]
    return dict(zip(names, model["cells"], strict=True))


def test_the_knee_stands_first_beside_the_base_model(two: RunDirectory) -> None:
    parsed, knee = page(two), Frontier.of(two.trials()).knee
    assert parsed.headings[0] == f"The knee: trial {knee.number}"
    first, second = parsed.texts("div", **{"class": "card"})
    assert first.startswith("keyword-rate lower is better 41.7 %")
    assert "40 of 96; 95 % interval 32.3 % to 51.7 %" in first
    assert "base model: 93.8 % (90 of 96)" in first
    assert "kl-divergence" in second and "0.01 nats per token" in second


def test_a_strip_runs_over_the_value_its_interval_and_the_base_model() -> None:
    assert strip(rate(24), rate(96)) == {
        "value": 25.0,
        "low": pytest.approx(100 * rate(24).low, abs=0.01),
        "width": pytest.approx(100 * (rate(24).high - rate(24).low), abs=0.02),
        "base": 100.0,
    }
    below = strip(Score("gain", -1, -2, 0, goal="maximize"), Score("gain", 2, 2, 2))
    assert below == {"value": 25.0, "low": 0.0, "width": 50.0, "base": 100.0}
    assert strip(Score("nil", 0, 0, 0), None) == {"value": 0, "low": 0, "width": 0}


def test_any_two_models_can_be_chosen_and_the_knee_meets_the_base_model(two: RunDirectory) -> None:
    parsed = page(two)
    numbers = [str(trial.number) for trial in two.trials() if trial.scorecard]
    for select in ("first", "second"):
        keys = [a["value"] for t, a, _ in options(parsed, select)]
        assert sorted(keys) == sorted(["base", *numbers])
        (chosen,) = [a["value"] for t, a, _ in options(parsed, select) if "selected" in a]
        knee = str(Frontier.of(two.trials()).knee.number)
        assert chosen == {"first": knee, "second": "base"}[select]


def options(parsed: Page, select: str) -> list[Any]:
    places = [i for i, (t, a, _) in enumerate(parsed.elements) if t == "select"]
    start = next(i for i in places if parsed.elements[i][1].get("id") == select)
    stop = min([i for i in places if i > start], default=len(parsed.elements))
    return [e for e in parsed.elements[start:stop] if e[0] == "option"]


def test_a_sheet_holds_scores_plan_and_strengths(two: RunDirectory) -> None:
    parsed, trial = page(two), two.trial(1)
    found = cells(parsed, "1")
    score = rate(40)
    assert found["keyword-rate"][1:] == [score.value, score.low, score.high]
    assert found["keyword-rate"][0].endswith(" 40/96")
    assert found["norm"] == ["row"] and found["attn.peak"][1] == trial.plan.to_params()["attn.peak"]
    (model,) = [model for model in sheets(parsed)["models"] if model["key"] == "1"]
    for component in ("attn", "mlp"):
        expected = trial.plan.strengths(component, LAYERS)
        assert model["strengths"][component] == pytest.approx(expected, rel=1e-3)
    base = next(model for model in sheets(parsed)["models"] if model["key"] == "base")
    assert base["strengths"] == {} and cells(parsed, "base")["attn.peak"] is None


def test_a_directions_layer_is_told_only_where_one_direction_serves_all(two: RunDirectory) -> None:
    parsed = page(two)
    scopes = set()
    for trial in two.trials():
        if trial.scorecard is None:
            continue
        (model,) = [m for m in sheets(parsed)["models"] if m["key"] == str(trial.number)]
        one = trial.plan.scope == "global"
        assert model["direction"] == (trial.plan.direction_layer if one else None)
        assert (cells(parsed, str(trial.number))["direction_layer"] is not None) == one
        scopes.add(trial.plan.scope)
    assert scopes == {"global", "per-layer"}


def test_bounds_are_texts_without_numbers_to_subtract(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, [*TWO, stopped(41, 0.3)], BASE))
    assert cells(parsed, "4")["keyword-rate"] == ["≥ 0.427 41/96"]
    groups = [a["label"] for t, a, _ in parsed.elements if t == "optgroup"]
    assert groups[: len(groups) // 2] == [
        "Original",
        "On the frontier",
        "Other trials",
        "Stopped early",
    ]


def test_a_run_without_a_baseline_compares_trials(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, TWO, None))
    assert "base" not in [model["key"] for model in sheets(parsed)["models"]]
    chosen = [
        a["value"]
        for select in ("first", "second")
        for _, a, _ in options(parsed, select)
        if "selected" in a
    ]
    assert len(set(chosen)) == 2
    assert "this trial" in parsed.visible and "base model" not in parsed.texts("ul")[0]


def test_a_run_with_one_trial_has_no_knee_to_choose(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, [card(length(3.0))], None, recipe(["length"])))
    assert parsed.headings[0] == "The best: trial 0"
    assert "higher is better" in parsed.texts("div", **{"class": "card"})[0]


def test_a_thousand_trials_make_a_page_that_can_be_sent(tmp_path: Path) -> None:
    cards = [card(rate(n % 90), divergence(1.0 + n / 1000)) for n in range(1000)]
    directory = make(tmp_path, cards, BASE)
    text = directory.path / "report.html"
    from ray_abliterate.report.report import write_report

    assert write_report(directory) == text
    assert text.stat().st_size < 8_000_000
