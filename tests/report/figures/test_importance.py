"""Parameter importances, read back from the page that embeds them."""

from pathlib import Path

import pytest

from tests.support.report_runs import (
    BASE,
    TWO,
    card,
    divergence,
    make,
    page,
    plans,
    rate,
)


def test_importances_add_up_to_one_for_every_objective(tmp_path: Path) -> None:
    draw, cards = plans(), []
    for _ in range(40):
        peak = dict(draw().profiles)["attn"].peak
        cards.append(card(rate(round(96 * (1.5 - peak))), divergence(0.1 * peak)))
    traces = page(make(tmp_path, cards, BASE)).traces("importance")
    assert set(traces) == {"keyword-rate", "kl-divergence"}
    for trace in traces.values():
        assert sum(trace["x"]) == pytest.approx(1)
        assert trace["y"][0] == "attn.peak"


def test_few_trials_give_a_sentence_instead_of_importances(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, TWO, BASE))
    assert "4 trials finished; importances need 8" in parsed.visible
    assert "importance" not in parsed.figures


def test_a_constant_objective_has_no_importances_and_says_so(tmp_path: Path) -> None:
    cards = [card(rate(96), divergence(0.01 * n)) for n in range(1, 20)]
    parsed = page(make(tmp_path, cards, BASE))
    assert set(parsed.traces("importance")) == {"kl-divergence"}
    assert "about the same keyword-rate" in parsed.visible


def test_all_trials_alike_have_no_importances(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, [card(rate(96), divergence(1.0))] * 9, BASE))
    assert "importance" not in parsed.figures
