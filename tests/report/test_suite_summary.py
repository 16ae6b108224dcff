"""What suites measured, in the report's table, figures and hover texts."""

import json
import re
from pathlib import Path

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from tests.support.report_runs import BASE, TWO, make, measured, page


@pytest.fixture
def validated(tmp_path: Path) -> RunDirectory:
    directory = make(tmp_path, TWO, BASE)
    measured(directory, {"base": 8, "trial-1": 7, "trial-3": 5})
    return directory


def test_suites_are_in_the_table_the_hover_and_the_comparison(validated: RunDirectory) -> None:
    parsed = page(validated)
    assert "What else changed" in parsed.headings
    rows = [row for row in parsed.texts("tr") if re.match("(base model|trial .) 0", row)][1:]
    assert [row[:13] for row in rows] == ["base model 0.", "trial 3 0.5 [", "trial 1 0.7 ["]
    assert "-0.3 [" in rows[1] and ", p " in rows[1]
    text = parsed.traces("frontier")["frontier"]["text"][0]
    assert "<br>facts 0.5 [" in text and "from the base model" in text
    sheets = json.loads(parsed.texts("script", id="sheets")[0])
    place = [field["name"] for field in sheets["fields"]].index("facts")
    assert sheets["fields"][place]["goal"] == "maximize"
    found = {model["key"]: model["cells"][place] for model in sheets["models"]}
    assert found["3"][1] == 0.5 and found["0"] is None
    assert "not all chunks" in found["1"][0]


def test_scores_of_suites_lie_along_the_frontier_with_the_base_model_as_a_band(
    validated: RunDirectory,
) -> None:
    (view,) = page(validated).figures["validation"]["views"]
    (points,) = view["data"]
    assert points["customdata"] == ["1", "3"] and points["y"] == [0.7, 0.5]
    assert points["x"] == [0.01, 1.5]
    band = view["layout"]["shapes"][0]
    assert band["y0"] < 0.8 < band["y1"] and view["layout"]["shapes"][1]["y0"] == 0.8


def test_curves_go_to_the_last_chunk_over_powers_of_two(validated: RunDirectory) -> None:
    parsed = page(validated)
    curves = parsed.traces("curves")
    assert list(curves) == ["base model", "trial 1", "trial 3"]
    assert curves["trial 3"]["x"] == [10, 20, 40, 50] and set(curves["trial 3"]["y"]) == {0.5}
    assert curves["trial 1"]["x"] == [10, 20]


def test_suites_that_cannot_be_read_are_a_warning(validated: RunDirectory) -> None:
    (file,) = (validated.path / "evaluations" / "trial-3").iterdir()
    file.write_text("{broken\n" + file.read_text("utf-8"), "utf-8")
    parsed = page(validated)
    assert "What else changed" not in parsed.headings
    assert any("line 1 is damaged" in warning for warning in parsed.texts("li"))
