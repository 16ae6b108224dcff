"""Figures of whole pages, given to plotly itself."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ray_abliterate.search.score import Scorecard
from tests.support.report_runs import (
    card,
    divergence,
    length,
    make,
    page,
    rate,
    recipe,
)


@pytest.mark.parametrize("count", [1, 3])
def test_plotly_knows_every_setting_of_the_figures(tmp_path: Path, count: int) -> None:
    from plotly import graph_objects

    names = ["keyword-rate", "kl-divergence", "length"][:count]
    cards: list[Scorecard | str] = [
        card(*[rate(h), divergence(0.001 * 2**h), length(50.0 - h)][:count]) for h in range(1, 12)
    ]
    base = card(*[rate(90), divergence(0.0), length(60.0)][:count])
    last = [replace(score, bound=True) for score in cards[-1].scores]  # type: ignore[union-attr]
    every = [*cards, card(*last), "failed"]
    figures = page(make(tmp_path, every, base, recipe(names))).figures
    assert len(figures) == 11
    for figure in figures.values():
        for view in figure["views"]:
            plain = json.loads(re.sub(r"var\(--\w+\)", "#123456", json.dumps(view)))
            graph_objects.Figure(data=plain["data"], layout=plain["layout"])
            x, y = plain["layout"]["xaxis"], plain["layout"]["yaxis"]
            assert x["title"]["text"]
            assert y["title"]["text"] or "ticktext" in y or y["type"] == "category"
