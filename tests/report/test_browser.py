"""The report in a real browser: drawn, quiet, offline, readable at both widths, and it compares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.report.report import write_report
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.score import Score
from tests.support.browser import Browser, find_chromium, open_browser
from tests.support.report_runs import (
    card,
    divergence,
    event,
    export,
    journal,
    make,
    measured,
    recipe,
)

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")

EVIL = '<img src=x onerror="document.title=1">"\'</script>'
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    assert program is not None
    with open_browser(program) as found:
        yield found


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that has every part, and bad names where a name can be."""

    def scored(left: float, damage: float) -> Any:
        return card(Score(EVIL, left, left - 0.1, left + 0.1), divergence(damage))

    cards = [scored(0.9 - 0.08 * n, 0.01 * 1.6**n) for n in range(10)]
    path = tmp_path_factory.mktemp("everything")
    settings = recipe([EVIL, "kl-divergence"], model=EVIL)
    directory = make(path, [*cards, f"failed: {EVIL}"], scored(0.95, 0.0), settings)
    directory.record_facts(warnings=[EVIL], note=EVIL)
    journal(directory, [(10 * n, 10 * n + 15) for n in range(11)])
    event(directory, 30, "replica-lost", replica=EVIL, reason=EVIL)
    event(directory, 40, "replica-back", replica=EVIL, seconds=10.0)
    measured(directory, {"base": 8, "trial-3": 7, "trial-9": 5})
    export(directory, "trial-3", 0.5, True, "config")
    return directory


@pytest.fixture(scope="module")
def report(everything: RunDirectory) -> Path:
    return write_report(everything)


@pytest.fixture(scope="module")
def drawn(report: Path, browser: Browser) -> Browser:
    """The page at desktop width."""
    browser.set_screen(*DESK)
    browser.open(report)
    return browser


def test_all_figures_are_drawn_without_a_complaint_or_a_request(
    drawn: Browser, everything: RunDirectory
) -> None:
    names = drawn.run("Object.keys(figures)")
    assert len(names) == 15
    painted = drawn.run(
        "Object.keys(figures).filter(name => document.querySelector("
        "`#plot-${name} .trace, #plot-${name} .hm image, #plot-${name} .barlayer .point`))"
    )
    assert painted == names
    assert drawn.complaints == []
    addresses = [request for request in drawn.requests if not request.startswith("data:")]
    assert addresses == [everything.report.absolute().as_uri()]


def test_nothing_that_names_hold_is_run_or_taken_for_a_tag(drawn: Browser) -> None:
    assert drawn.run("document.title") == f"{EVIL}: report"
    assert drawn.run("document.querySelectorAll('img').length") == 0
    assert drawn.run("document.querySelector('h1').textContent") == EVIL
    assert EVIL in drawn.run("document.querySelector('#comparison').textContent")


def test_a_part_of_the_policy_would_stop_what_got_through(drawn: Browser) -> None:
    asked = len(drawn.requests)
    drawn.run("fetch('https://example.invalid/').catch(() => 0)")
    assert any("Content Security Policy" in complaint for complaint in drawn.complaints)
    assert not any("example.invalid" in request for request in drawn.requests[asked:])
    drawn.complaints.clear()


LINE = "document.getElementById('plot-auroc').data[0].line.color"
REDRAWN = f"""new Promise((done, failed) => {{
    const began = Date.now(), look = () => {LINE} !== "%s" ? done()
        : Date.now() - began > 20000 ? failed("not redrawn") : setTimeout(look, 50);
    look();
}})"""
ROWS = """JSON.stringify([...document.querySelectorAll("#comparison tbody tr:not(.part)")].map(
    row => [row.querySelector("th").firstChild.textContent,
            [...row.querySelectorAll("td")].map(cell => cell.innerText)]))"""
STRENGTHS = """document.getElementById("plot-strengths").data.map(
    trace => [trace.name, trace.line.dash])"""
POINT = """(() => {
    const plot = document.getElementById("plot-frontier"), layout = plot._fullLayout;
    plot.scrollIntoView({block: "center"});
    const trace = plot.data.find(trace => trace.name === "frontier");
    const at = trace.customdata.indexOf("5"), box = plot.getBoundingClientRect();
    return [box.left + layout.xaxis._offset + layout.xaxis.d2p(trace.x[at]),
            box.top + layout.yaxis._offset + layout.yaxis.d2p(trace.y[at])];
})()"""
CUT = """[...document.querySelectorAll("main *")].filter(
    one => !one.closest("pre, .hidden-text, thead") && one.getClientRects().length
        && one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 120))"""
SMALL = """[...document.querySelectorAll("main *")].filter(
    one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())
        && parseFloat(getComputedStyle(one).fontSize) < 12)
    .map(one => one.outerHTML.slice(0, 120))"""
UNTOLD = """[...document.querySelectorAll(".plot")].filter(plot => !document.getElementById(
    plot.getAttribute("aria-describedby"))?.textContent.trim()).map(plot => plot.id)"""


def rows(browser: Browser) -> dict[str, list[str]]:
    """The comparison: three cells by the field's name."""
    return dict(json.loads(browser.run(ROWS)))


def choose(browser: Browser, which: str, key: str) -> None:
    pick = f"document.getElementById({which!r})"
    browser.run(f"{pick}.value = {key!r}; {pick}.dispatchEvent(new Event('change'))")


def test_two_trials_are_compared_as_they_are_chosen(
    drawn: Browser, everything: RunDirectory
) -> None:
    choose(drawn, "first", "9")
    choose(drawn, "second", "3")
    found = rows(drawn)
    left, right, by = found["kl-divergence"]
    assert left.startswith("0.687 [") and right.startswith("0.041 [")
    assert by.split("\n") == ["+0.646", "worse"]
    assert found["facts"][2].split("\n")[0] == "−0.2"
    assert "overlap" in found["facts"][2] and "overlap" not in found["kl-divergence"][2]
    assert found[EVIL][2].split("\n") == ["−0.48", "better"]
    plan = everything.trial(9).plan.to_params()
    assert float(found["attn.peak"][0]) == pytest.approx(plan["attn.peak"], rel=0.01)
    traces = drawn.run(STRENGTHS)
    assert traces == [
        ["attn, trial 9", "solid"],
        ["mlp, trial 9", "solid"],
        ["attn, trial 3", "dash"],
        ["mlp, trial 3", "dash"],
    ]
    drawn.run("document.getElementById('swap').click()")
    assert rows(drawn)["kl-divergence"][2].split("\n") == ["−0.646", "better"]


def test_a_click_on_a_point_and_a_button_take_a_trial_into_the_comparison(drawn: Browser) -> None:
    choose(drawn, "first", "9")
    choose(drawn, "second", "base")
    x, y = drawn.run(POINT)
    mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
    drawn.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    drawn.run("new Promise(done => setTimeout(done, 200))")
    assert "trial 5" in drawn.run("document.querySelector('.hoverlayer').textContent")
    for kind in ("mousePressed", "mouseReleased"):
        drawn.call("Input.dispatchMouseEvent", type=kind, **mouse)
    assert drawn.run("document.getElementById('first').value") == "5"
    assert "trial 5 is in the comparison" in drawn.run(
        "document.querySelector('.said').textContent"
    )
    drawn.run("document.querySelector('button[data-take=\"9\"]').click()")
    assert drawn.run("document.getElementById('first').value") == "9"
    assert drawn.run("document.activeElement.id") == "first"


@pytest.mark.parametrize(("width", "height"), [PHONE, DESK])
def test_nothing_sticks_out_and_no_text_is_too_small_or_pale(
    drawn: Browser, report: Path, width: int, height: int
) -> None:
    drawn.set_screen(width, height, touch=width < 700)
    drawn.open(report)
    for dark in (False, True):
        light = drawn.run(LINE)
        drawn.set_screen(width, height, dark, touch=width < 700)
        if dark:
            drawn.run(REDRAWN % light)
        assert drawn.complaints == []
        assert drawn.run("document.documentElement.scrollWidth") == width
        assert drawn.run(CUT) == []
        assert drawn.run(SMALL) == []
        paper = drawn.run("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") != dark
        for name in ("ink", "muted", "accent", "knee", "c0", "c1", "c2"):
            for back in ("paper", "panel"):
                assert contrast(drawn, name, back) >= 4.5, (name, back)


def contrast(browser: Browser, name: str, back: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2, 1.4.3)."""
    levels = []
    for colour in (name, back):
        text = browser.run(f"css('--{colour}')")
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        lines = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        levels.append(0.2126 * lines[0] + 0.7152 * lines[1] + 0.0722 * lines[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_every_figure_has_a_text_for_those_who_cannot_see_it(drawn: Browser) -> None:
    assert drawn.run(UNTOLD) == []


def test_the_knee_is_told_as_text(drawn: Browser, everything: RunDirectory) -> None:
    knee = Frontier.of(everything.trials()).knee.number
    assert drawn.run("document.querySelector('h2').innerText") == f"The knee: trial {knee}"


def test_a_script_that_throws_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """Or the tests above would see nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text("<!DOCTYPE html><script>undefinedThing()</script>", "utf-8")
    browser.complaints.clear()
    browser.open(bad)
    assert any("undefinedThing" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
