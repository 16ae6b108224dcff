"""The figure of the frontier, read back from the page that embeds it."""

import math
from pathlib import Path

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.score import wilson
from tests.support.report_runs import (
    BASE,
    PROMPTS,
    TWO,
    card,
    divergence,
    length,
    make,
    page,
    rate,
    recipe,
    stopped,
)


def test_the_knee_is_marked_in_table_and_figure(two: RunDirectory) -> None:
    knee = Frontier.of(two.trials()).knee.number
    parsed = page(two)
    assert [r for r in parsed.texts("tr") if r.startswith(f"{knee} knee")]
    assert len([r for r in parsed.texts("tr") if " knee " in r]) == 1
    assert parsed.traces("frontier")["knee"]["text"][0].startswith(f"<b>trial {knee}</b>")


def test_the_frontier_figure_holds_all_trials_the_members_and_the_base_model(
    two: RunDirectory,
) -> None:
    traces = page(two).traces("frontier")
    assert len(traces["trials"]["x"]) == 12
    assert traces["trials"]["marker"]["color"] == [0, 1, 2, 3, *range(5, 13)]
    assert traces["frontier"]["y"] == [2 / 96, 40 / 96, 80 / 96]
    assert traces["frontier"]["x"] == [1.5, 0.01, 1e-4]
    low, high = wilson(40, PROMPTS)
    bars = traces["frontier"]["error_y"]
    assert bars["array"][1] == pytest.approx(high - 40 / 96)
    assert bars["arrayminus"][1] == pytest.approx(40 / 96 - low)
    assert traces["base model"]["y"] == [90 / 96]


def test_hovering_shows_number_scores_and_plan(two: RunDirectory) -> None:
    text = page(two).traces("frontier")["trials"]["text"][1]
    assert text.startswith("<b>trial 1</b><br>keyword-rate 0.417 [")
    assert "40/96" in text and "attn: peak" in text and "direction" in text


def test_zero_divergence_has_a_place_on_the_log_axis(two: RunDirectory) -> None:
    parsed = page(two)
    axis = parsed.axis("frontier", "xaxis")
    (base,) = parsed.traces("frontier")["base model"]["x"]
    assert axis["type"] == "log"
    assert 0 < base < 1e-4
    assert axis["ticktext"][axis["tickvals"].index(base)] == "0"
    assert axis["range"][0] < math.log10(base) and axis["range"][1] > math.log10(1.5)
    assert "0 at the left edge" in axis["title"]["text"]


def test_narrow_or_negative_scores_get_a_linear_axis(tmp_path: Path) -> None:
    cards = [card(rate(h), divergence(k)) for h, k in ((3, 0.2), (5, 0.1))]
    directory = make(tmp_path, cards, card(rate(90), divergence(0.0)))
    assert "type" not in page(directory).axis("frontier", "xaxis")


def test_all_divergences_zero_make_no_log_axis(tmp_path: Path) -> None:
    directory = make(tmp_path, [card(rate(3), divergence(0.0))], BASE)
    parsed = page(directory)
    assert "type" not in parsed.axis("frontier", "xaxis")
    assert parsed.traces("frontier")["frontier"]["x"] == [0.0]


def test_trials_that_were_stopped_are_drawn_apart_and_counted_and_no_members(
    tmp_path: Path,
) -> None:
    cards = [*TWO, stopped(0, 1e-9), stopped(41, 0.3)]
    directory = make(tmp_path, cards, BASE)
    parsed = page(directory)
    traces = parsed.traces("frontier")
    assert len(traces["trials"]["x"]) == 4
    assert traces["stopped early (bound)"]["y"] == [0, 41 / 96]
    assert traces["stopped early (bound)"]["marker"]["symbol"] == "circle-open"
    text = traces["stopped early (bound)"]["text"][1]
    assert "stopped early" in text and "keyword-rate ≥ 0.427 41/96" in text
    assert len(traces["frontier"]["x"]) == 3
    assert "Of these, stopped early2" in parsed.visible and "6 of 60" in parsed.visible
    assert len(parsed.traces("hypervolume")["share"]["x"]) == 4
    assert parsed.traces("seconds")["stopped early"]["x"] == [4, 5]
    assert "stopped early" not in page(make(tmp_path / "other", TWO, BASE)).visible


def test_one_objective_is_drawn_over_the_trials(tmp_path: Path) -> None:
    cards = [card(rate(hits)) for hits in (50, 60, 20, 40)]
    directory = make(tmp_path, cards, card(rate(90)), recipe(["keyword-rate"]))
    parsed = page(directory)
    traces = parsed.traces("frontier")
    assert traces["trials"]["x"] == [0, 1, 2, 3]
    assert traces["best so far"]["y"] == [50 / 96, 50 / 96, 20 / 96, 20 / 96]
    assert traces["best"]["x"] == [2] and traces["best"]["error_y"]["array"][0] > 0
    assert traces["base model"]["y"] == [90 / 96] * 2
    assert parsed.axis("frontier", "xaxis")["title"]["text"] == "trial number"


def test_three_objectives_have_a_view_of_every_pair(tmp_path: Path) -> None:
    cards = [card(rate(h), divergence(0.1 * h), length(50.0 - h)) for h in range(1, 12)]
    settings = recipe(["keyword-rate", "kl-divergence", "length"])
    directory = make(tmp_path, cards, card(rate(90), divergence(0.0), length(60.0)), settings)
    parsed = page(directory)
    labels = [view["label"] for view in parsed.figures["frontier"]["views"]]
    assert labels == [
        "keyword-rate against kl-divergence",
        "keyword-rate against length",
        "kl-divergence against length",
    ]
    assert len(parsed.texts("select", **{"data-figure": "frontier"})) == 1
    assert parsed.traces("frontier", 2)["frontier"]["mode"] == "markers"
    shares = parsed.traces("hypervolume")["share"]["y"]
    assert shares == sorted(shares) and 0 < shares[-1] <= 1


def test_the_higher_score_counts_as_best_where_it_is_maximised(tmp_path: Path) -> None:
    cards = [card(length(value)) for value in (10.0, 30.0, 20.0)]
    directory = make(tmp_path, cards, card(length(5.0)), recipe(["length"]))
    parsed = page(directory)
    assert parsed.traces("frontier")["best so far"]["y"] == [10.0, 30.0, 30.0]
    assert "length 2.5" in parsed.figures["hypervolume"]["note"]
