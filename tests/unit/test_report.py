"""The report, read back from its HTML and the figures embedded in it."""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.frontier import Frontier, Trial
from ray_abliterate.plan import ModelShape, Plan, Space
from ray_abliterate.recipe import Recipe
from ray_abliterate.report import build_report, write_report
from ray_abliterate.rundir import Baseline, RunDirectory
from ray_abliterate.scoring import Score, Scorecard, wilson

LAYERS = 12
SHAPE = {"layers": LAYERS, "hidden": 32, "components": ["attn", "mlp"], "dtype": "bfloat16"}
PROMPTS = 96
VOID = {"meta", "link", "img", "br", "input", "base", "hr"}


def recipe(
    scores: Sequence[str] = ("keyword-rate", "kl-divergence"), model: str = "demo"
) -> Recipe:
    file = {"file": "prompts.txt"}
    kinds = {name: name for name in ("keyword-rate", "kl-divergence")}
    return Recipe.model_validate(
        {
            "model": {"name": model},
            "prompts": {
                "behaviour": {"builtin": "cooking-train", "split": "[:40]"},
                "neutral": file,
            },
            "search": {"trials": 60},
            "scorers": [
                {"kind": kinds.get(name, "plug:In"), "name": name, "prompts": file}
                for name in scores
            ],
        }
    )


def rate(hits: int) -> Score:
    low, high = wilson(hits, PROMPTS)
    detail = {"hits": hits, "total": PROMPTS}
    return Score("keyword-rate", hits / PROMPTS, low, high, detail=detail)


def divergence(value: float) -> Score:
    low, high = 0.8 * value, 1.3 * value
    return Score(
        "kl-divergence", value, low, high, unit="nats per token", detail={"worst": "SECRET"}
    )


def length(value: float) -> Score:
    return Score("length", value, value - 1, value + 1, goal="maximize", unit="tokens")


def card(*scores: Score) -> Scorecard:
    return Scorecard(scores)


def plans(layers: int = LAYERS, seed: int = 0) -> Callable[[], Plan]:
    """Draws random plans of the default search space."""
    shape = ModelShape(layers, 32, ("attn", "mlp"))
    space, dice = Space.of(shape, recipe().search.space, "row"), random.Random(seed)

    def draw() -> Plan:
        params = {
            name: dice.choice(d.options) if hasattr(d, "options") else dice.uniform(d.low, d.high)
            for name, d in space.parameters
        }
        return space.plan(params)

    return draw


def separation(layers: int = LAYERS) -> tuple[dict[str, float], ...]:
    return tuple(
        {
            "layer": layer,
            "auroc": 0.5 + 0.5 * math.exp(-(((layer / layers - 0.6) / 0.3) ** 2)),
            "fisher": 8 * math.exp(-(((layer / layers - 0.6) / 0.2) ** 2)),
            "cosine": 0.99 - 0.4 * layer / layers,
            "behaviour_norm": 2.0 * 1.1**layer,
            "neutral_norm": 1.9 * 1.1**layer,
            "direction_norm": 0.3 * 1.15**layer,
        }
        for layer in range(layers)
    )


def make(
    path: Path,
    cards: Sequence[Scorecard | str],
    base: Scorecard | None = None,
    settings: Recipe | None = None,
    **environment: Any,
) -> RunDirectory:
    """A run directory; a trial is given as its scorecard, or as its error."""
    directory = RunDirectory.create(path / "run", settings or recipe(), "")
    directory.note(model=SHAPE, started="2026-01-31T12:00:00+0000")
    directory.note(versions={"torch": "2.13"}, **environment)
    if base is not None:
        directory.save_baseline(Baseline(base, separation(), 7))
    draw = plans()
    for number, outcome in enumerate(cards):
        failed = isinstance(outcome, str)
        scorecard, error = (None, outcome) if failed else (outcome, None)
        directory.append(Trial(number, draw(), scorecard, 2.5 + number, error))  # type: ignore[arg-type]
    return directory


BASE = card(rate(90), divergence(0.0))
TWO = [card(rate(h), divergence(k)) for h, k in ((80, 1e-4), (40, 0.01), (50, 0.5), (2, 1.5))]


class Page(HTMLParser):
    """A page as its elements: tag, attributes, text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.elements[-1][2])

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self._open:
            texts.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            " ".join("".join(texts).split())
            for name, attrs, texts in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]

    @property
    def headings(self) -> list[str]:
        return self.texts("h2")

    @property
    def visible(self) -> str:
        return self.texts("main")[0]

    @property
    def figures(self) -> dict[str, Any]:
        found = self.texts("script", id="figures")
        return json.loads(found[0], parse_constant=pytest.fail) if found else {}

    def traces(self, figure: str, view: int = 0) -> dict[str, Any]:
        return {trace["name"]: trace for trace in self.figures[figure]["views"][view]["data"]}

    def axis(self, figure: str, axis: str, view: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.figures[figure]["views"][view]["layout"][axis]
        return found


def page(directory: RunDirectory) -> Page:
    return Page(build_report(directory))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two objectives, twelve finished trials, one failed."""
    later = [card(rate(60 + n), divergence(0.6 + 0.1 * n)) for n in range(8)]
    cards = [*TWO, "RuntimeError: replica died", *later]
    return make(tmp_path_factory.mktemp("two"), cards, BASE, warnings=["the sets <i>overlap</i>"])


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
    assert loaded == []
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
    assert "base 0.938 [" in row and "90/96" in row
    assert "base 0 [0, 0]" in row
    assert "3.5" in row


def test_the_commands_name_run_and_trial(two: RunDirectory) -> None:
    commands = "\n".join(page(two).texts("pre"))
    assert f"ray-abliterate show {two.path} --trial 3" in commands
    assert f"ray-abliterate export {two.path} --trial 3 --to DIR" in commands
    assert f"ray-abliterate chat {two.path} --trial 3" in commands


def test_a_run_whose_name_has_blanks_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    directory = make(tmp_path / "my runs", TWO, BASE)
    assert any(f"show '{directory.path}' --trial" in text for text in page(directory).texts("pre"))


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


def stopped(hits: int, kl: float) -> Scorecard:
    detail = {"hits": hits, "total": PROMPTS}
    value = hits / PROMPTS
    return card(Score("keyword-rate", value, value, 1.0, detail=detail, bound=True), divergence(kl))


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
    assert "Of these stopped early2" in parsed.visible and "6 of 60" in parsed.visible
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


def test_a_run_without_trials_says_so(tmp_path: Path) -> None:
    parsed = page(make(tmp_path, [], BASE))
    assert "No trial has finished yet" in parsed.visible
    assert "Where the behaviour shows" in parsed.headings
    assert set(parsed.figures) == {"auroc", "fisher", "cosine", "norms"}


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
    assert "Nothing was noted" in parsed.visible


def test_strengths_are_drawn_for_each_member_with_the_knee_chosen(two: RunDirectory) -> None:
    figure, frontier = page(two).figures["strengths"], Frontier.of(two.trials())
    chosen = figure["views"][figure["chosen"]]
    assert len(figure["views"]) == len(frontier)
    assert chosen["label"].startswith(f"trial {frontier.knee.number} (knee)")
    lines = {trace["name"]: trace["y"] for trace in chosen["data"]}
    plan = frontier.knee.plan
    assert set(lines) == {"attn", "mlp"}
    for component, values in lines.items():
        assert tuple(values) == plan.strengths(component, LAYERS)


def test_the_direction_layer_is_marked_where_one_direction_serves_all(two: RunDirectory) -> None:
    views = page(two).figures["strengths"]["views"]
    for view, member in zip(views, Frontier.of(two.trials()).members, strict=True):
        marks = [shape["x0"] for shape in view["layout"].get("shapes", [])]
        assert marks == ([member.plan.direction_layer] if member.plan.scope == "global" else [])


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


def test_the_hypervolume_never_shrinks_and_names_its_reference(two: RunDirectory) -> None:
    parsed = page(two)
    shares = parsed.traces("hypervolume")["share"]["y"]
    assert len(shares) == 12 and shares == sorted(shares)
    assert "reference point (keyword-rate" in parsed.figures["hypervolume"]["note"]


def test_warnings_of_the_run_and_of_the_bounds_are_listed(tmp_path: Path) -> None:
    params = plans()().to_params() | {"attn.peak": 1.5}
    directory = make(tmp_path, [], BASE, warnings=["the sets <i>overlap</i>"])
    directory.append(Trial(0, Plan.from_params(params, "row"), TWO[0], 1.0))
    warnings = page(directory).texts("li")
    assert warnings[-1] == "the sets <i>overlap</i>"
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
    assert len(parsed.texts("script")) == 3
    assert parsed.axis("frontier", "yaxis")["title"]["text"].startswith("&lt;script&gt;")
    assert "&lt;script&gt;" in parsed.traces("frontier")["trials"]["text"][0]


def test_details_of_scores_beyond_counts_are_not_shown(two: RunDirectory) -> None:
    assert "SECRET" not in build_report(two)


def test_environment_and_recipe_are_listed(two: RunDirectory) -> None:
    parsed = page(two)
    pairs = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True))
    assert pairs["model.components"] == "attn, mlp" and pairs["versions.torch"] == "2.13"
    assert "warnings" not in pairs
    assert Recipe.from_json(parsed.texts("pre", id="recipe")[0]) == two.recipe


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
    assert len(figures) == 9
    for figure in figures.values():
        for view in figure["views"]:
            plain = json.loads(re.sub(r"var\(--\w+\)", "#123456", json.dumps(view)))
            graph_objects.Figure(data=plain["data"], layout=plain["layout"])
            axes = [plain["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
            assert all(axes)
