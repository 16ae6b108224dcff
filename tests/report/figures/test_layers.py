"""Figures over layers, read back from the page that embeds them."""

import math
from pathlib import Path

import pytest

from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.search.frontier import Frontier
from tests.support.report_runs import (
    BASE,
    LAYERS,
    make,
    page,
    separation,
)


def test_strengths_of_the_frontiers_members_are_drawn_a_row_for_each(two: RunDirectory) -> None:
    figure, members = page(two).figures["members"], Frontier.of(two.trials()).members
    assert [view["label"] for view in figure["views"]] == ["attn", "mlp"]
    for view in figure["views"]:
        (heat,) = view["data"]
        assert heat["y"] == [f"trial {member.number}" for member in members]
        for row, member in zip(heat["z"], members, strict=True):
            assert row == pytest.approx(member.plan.strengths(view["label"], LAYERS), rel=1e-3)
    assert "best keyword-rate at the top" in figure["note"]


def test_the_separation_is_drawn_and_the_best_layer_marked(two: RunDirectory) -> None:
    parsed = page(two)
    assert parsed.traces("auroc")["auroc"]["y"] == [row["auroc"] for row in separation()]
    assert set(parsed.traces("norms")) == {"behaviour norm", "neutral norm", "direction norm"}
    layout = parsed.figures["fisher"]["views"][0]["layout"]
    assert [shape["x0"] for shape in layout["shapes"]] == [7]


def test_a_layer_without_a_finite_separation_leaves_a_gap(tmp_path: Path) -> None:
    directory = make(tmp_path, [])
    rows = [dict(row) for row in separation()]
    rows[2]["fisher"] = math.nan
    del rows[3]["fisher"]
    directory.save_baseline(Baseline(BASE, tuple(rows), 7))
    assert page(directory).traces("fisher")["fisher"]["y"][1:5].count(None) == 2
