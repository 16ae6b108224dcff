"""The report's texts and tables, read back from its HTML."""

import re
from pathlib import Path

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.export_notes import note_export, verified_exports
from ray_abliterate.recipe import Recipe
from ray_abliterate.report.report import build_report, write_report
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard, wilson
from tests.support.report_runs import (
    BASE,
    PROMPTS,
    TWO,
    Page,
    card,
    export,
    make,
    page,
    plans,
    recipe,
)


def test_the_report_lies_in_the_run_directory(two: RunDirectory) -> None:
    assert write_report(two) == two.report
    assert two.report.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_the_page_loads_nothing_from_anywhere(two: RunDirectory) -> None:
    text = build_report(two)
    loaded = [
        (tag, name, value)
        for tag, attributes, _ in Page(text).elements
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    ]
    assert [(tag, name) for tag, name, value in loaded if not str(value).startswith("#")] == []
    assert not {"link", "iframe", "base", "img"} & {tag for tag, _, _ in Page(text).elements}
    assert not any(re.search(r"@import|url\(", style) for style in Page(text).texts("style"))
    policy = [a["content"] for t, a, _ in Page(text).elements if a.get("http-equiv")]
    assert len(policy) == 1 and policy[0] is not None
    assert policy[0].startswith("default-src 'none'") and "http" not in policy[0]


def test_no_button_sends_a_figure_to_a_server(two: RunDirectory) -> None:
    script = page(two).texts("script")[-1]
    assert 'modeBarButtons: [["toImage", "resetScale2d"]]' in script
    assert 'plotlyServerURL: ""' in script


def test_plotly_is_there_once(two: RunDirectory) -> None:
    scripts = Page(build_report(two)).texts("script")
    assert sum(len(script) > 1_000_000 for script in scripts) == 1


def test_every_tag_is_closed(two: RunDirectory) -> None:
    parsed = page(two)
    assert parsed._open == []


def test_the_title_says_model_sets_counts_and_date(two: RunDirectory) -> None:
    text = page(two).visible
    for part in ("demo", "cooking-train [:40]", "prompts.txt", "12 of 60", "2026-01-31"):
        assert part in text
    assert "Trials failed1" in text


def test_the_table_holds_each_member_with_counts_and_the_base_model(two: RunDirectory) -> None:
    rows = page(two).texts("tr")
    assert [row.split()[0] for row in rows if "export" in row] == ["3", "1", "0"]
    row = next(row for row in rows if row.startswith("1 "))
    low, high = wilson(40, PROMPTS)
    assert f"0.417 [{low:.3g}, {high:.3g}] 40/96" in row
    assert "3.5" in row
    base = next(row for row in rows if row.startswith("base model "))
    assert "0.938 [" in base and "90/96" in base and "0 [0, 0]" in base


def test_the_commands_name_run_and_trial(two: RunDirectory) -> None:
    commands = "\n".join(page(two).texts("pre"))
    assert f"ray-abliterate show {two.path} --trial 3" in commands
    assert f"ray-abliterate export {two.path} --trial 3 --to DIR" in commands
    assert f"ray-abliterate chat {two.path} --trial 3" in commands


def test_a_run_whose_name_has_blanks_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    directory = make(tmp_path / "my runs", TWO, BASE)
    assert any(f"show '{directory.path}' --trial" in text for text in page(directory).texts("pre"))


def test_a_run_without_trials_says_so(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, [], BASE))
    assert "No trial has finished yet" in parsed.visible
    assert "Where the behaviour shows" in parsed.headings
    measures = {"auroc", "fisher", "silhouette", "mutual_information", "cosine", "norms"}
    assert set(parsed.figures) == measures


def test_a_run_that_has_only_a_recipe_makes_a_page(tmp_path: Path) -> None:
    parsed = page(RunDirectory.create(tmp_path / "run", recipe(), ""))
    assert "No trial has finished yet" in parsed.visible
    assert parsed.headings == ["Environment"]
    assert parsed.figures == {}


def test_a_run_whose_trials_all_failed_gives_the_reasons(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, ["out of memory", "KL is NaN <b>"], BASE))
    assert "all 2 failed" in parsed.visible
    assert {"out of memory", "KL is NaN <b>"} <= set(parsed.texts("pre"))
    assert len(parsed.traces("seconds")["failed"]["x"]) == 2
    assert "frontier" not in parsed.figures


def test_without_a_baseline_or_a_model_shape_the_page_still_builds(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO, None)
    (directory.path / "environment.json").unlink()
    parsed = page(directory)
    assert "base model" not in parsed.traces("frontier")
    assert "strengths" not in parsed.figures
    assert "Nothing is recorded yet" in parsed.visible


def test_warnings_of_the_run_and_of_the_bounds_are_listed(tmp_path: Path) -> None:
    params = plans()().to_params() | {"attn.peak": 1.5}
    directory = make(tmp_path, [], BASE, warnings=["the sets <i>overlap</i>"])
    directory.append_trial(Trial(0, Plan.from_params(params, "row"), TWO[0], 1.0))
    warnings = page(directory).texts("li")
    assert "the sets <i>overlap</i>" in warnings
    assert any("search.space.components.attn.peak" in warning for warning in warnings)


def test_texts_from_outside_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    cards: list[Scorecard | str] = [card(Score(evil, 0.5, 0.4, 0.6)), f"failed {evil}"]
    settings = recipe([evil], model=evil)
    directory = make(tmp_path, cards, card(Score(evil, 1, 1, 1)), settings, note=f"x {evil}")
    text = build_report(directory)
    parsed = Page(text)
    assert evil not in text
    assert parsed.texts("h1") == [evil] and parsed.texts("title") == [f"{evil}: report"]
    assert len(parsed.texts("script")) == 4
    assert parsed.axis("frontier", "yaxis")["title"]["text"].startswith("&lt;script&gt;")
    assert "&lt;script&gt;" in parsed.traces("frontier")["trials"]["text"][0]


def test_details_of_scores_beyond_counts_are_not_shown(two: RunDirectory) -> None:
    assert "SECRET" not in build_report(two)


def test_environment_and_recipe_are_listed(two: RunDirectory) -> None:
    parsed = page(two)
    pairs = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True))
    assert pairs["model.components"] == "attn, mlp" and pairs["versions.torch"] == "2.13"
    assert "warnings" not in pairs
    assert Recipe.from_json(parsed.texts("pre", id="recipe")[0]) == two.read_recipe()


def test_a_run_without_suites_or_exports_has_no_such_parts(two: RunDirectory) -> None:
    parsed = page(two)
    assert not {"What else changed", "Exports"} & set(parsed.headings)
    assert not {"validation", "curves"} & set(parsed.figures)


def test_exports_elsewhere_are_listed_as_long_as_they_are_there(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO, BASE)
    export(directory, "trial-3", 0.5, True, "config")
    own = directory.path / "exports" / "trial-3"
    away = own.rename(tmp_path / "away")
    export(directory, "trial-3", 0.5, True, "config")
    for folder in (own, away, away, tmp_path / "gone"):
        note_export(directory, folder)
    assert [one.name for one in verified_exports(directory)] == ["trial-3", "away"]
    assert str(away) not in " ".join(page(directory).texts("td"))


def test_exports_in_the_run_are_listed_with_what_they_scored(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO, BASE)
    export(directory, "trial-3", 0.5, True, "config")
    export(directory, "trial-1", 0.75, False, "adapter_config")
    export(directory, "torn", 0.5, True, "config")
    (directory.path / "exports" / "torn" / "verification.json").write_text('{"scores": [', "utf-8")
    parsed = page(directory)
    assert "Exports" in parsed.headings
    rows = {row.split()[0]: row for row in parsed.texts("tr")}
    assert "merged model keyword-rate: 0.5, 0.5 the trial's scores" in rows["trial-3"]
    assert "adapter keyword-rate: 0.5, 0.75 (too far) not the trial's scores" in rows["trial-1"]
    assert "<b>bfloat16</b>" in rows["trial-1"]
    assert "can't be read" in rows["torn"]
