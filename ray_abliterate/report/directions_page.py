"""A comparison of methods as a page, and as tables in a terminal."""

import math
from collections.abc import Sequence
from typing import Any

from ray_abliterate.directions.comparison.compare import MethodComparison
from ray_abliterate.directions.layer_selection import TABLE_HEADER as HEAD_LAYERS
from ray_abliterate.directions.layer_selection import LayerSelection
from ray_abliterate.directions.separability import auroc_error
from ray_abliterate.report.figures.plotly_parts import (
    Figure,
    four_digits,
    numbered_line,
    vertical_rule,
    view,
)
from ray_abliterate.report.page import Page, PageSection, PageTable, Plot

COLUMNS = (
    ("fisher", "Fisher"), ("silhouette", "silhouette"), ("mutual_information", "bits"),
    ("agreement", "halves' cosine"),
)  # fmt: skip
METHODS_HEADER = ("method", "layer", "AUROC", *(title for _, title in COLUMNS), "to the truth")
MEASURES: tuple[tuple[str, str, str, Figure], ...] = (
    ("auroc", "AUROC", "0.5: by chance", {"range": [0.38, 1.02]}),
    ("fisher", "Fisher ratio", "squared distance over variances", {"rangemode": "tozero"}),
    ("silhouette", "silhouette", "-1 to 1", {}),
    ("mutual_information", "mutual information", "bits, of 1", {"range": [-0.02, 1.02]}),
    ("agreement", "cosine of the two halves' directions", "1: the halves agree", {}),
)
ABOUT_METHODS = (
    "Each method at its own best layer (by the Fisher ratio, the last fifth left aside), on "
    "prompts that it was not found from: each half of the prompts is measured along the direction "
    "of the other half. “Halves' cosine” is that of the two halves' directions; “to the truth” the "
    "estimated cosine of the direction from all prompts with the one from infinitely many."
)
ABOUT_LAYERS = (
    "Log-odds (nats) that answers begin as refusals do: to held-out prompts that show the "
    "behaviour, the direction taken out of all weights; and to neutral ones, the direction added "
    "after its layer. The divergence is that of neutral prompts from the base model, the direction "
    "taken out."
)


def method_rows(found: MethodComparison) -> list[list[str]]:
    """A row of texts for each method."""
    rows = []
    for name in found.methods:
        best = found.best(name)
        error = auroc_error(best["auroc"], *found.counts)
        rows.append(
            [name, f"{best['layer']:.0f}", f"{best['auroc']:.3f} ± {error:.3f}"]
            + [_text(best[key]) for key, _ in COLUMNS]
            + [_text(found.steady(name))]
        )
    return rows


def cosine_rows(found: MethodComparison) -> list[list[str]]:
    """A row of cosines for each method, at the layer where samples were drawn."""
    matrix = found.cosines[found.layer]
    return [
        [name, *(_text(value) for value in matrix[place])]
        for place, name in enumerate(found.methods)
    ]


def stability_rows(found: MethodComparison) -> tuple[list[str], list[list[str]]]:
    """Sizes of samples, and a row of mean cosines for each method."""
    sizes = [point.prompts for point in next(iter(found.stability.values()))]
    rows = [
        [name, *(_text(point.mean) for point in points)] for name, points in found.stability.items()
    ]
    return [f"{size} prompts" for size in sizes], rows


def comparison_page(
    found: MethodComparison, model: str, selection: LayerSelection | None = None
) -> Page:
    """The page; with what layers' directions do, if they were tried."""
    sizes, steady = stability_rows(found)
    said = (selection.sentence(),) if selection else ()
    advice = PageSection(f"Take {found.advice.method}", (*found.advice.reasons, *said))
    failed = [f"{name} has no direction here: {why}" for name, why in found.failed.items()]
    methods = PageSection(
        "Methods",
        (ABOUT_METHODS, *failed),
        (PageTable(METHODS_HEADER, method_rows(found)),),
        (_separation(found),),
    )
    alike = PageSection(
        "How alike their directions are",
        ("Methods with cosines near 1 find the same; a search with either ends alike.",),
        (
            PageTable(
                ("method", *found.methods), cosine_rows(found), f"Cosines at layer {found.layer}"
            ),
        ),
        (_heat(found), _layers(found)),
    )
    enough = PageSection(
        "Whether there are enough prompts",
        (
            f"Cosines of two directions at layer {found.layer} from samples that share no prompt, "
            "so many of each set. Where they still rise at the right end, more prompts would help.",
        ),
        (PageTable(("method", *sizes), steady, "Mean cosine"),),
        (_steadiness(found),),
    )
    counts = f"{found.counts[0]} prompts that show the behaviour and {found.counts[1]} that don't"
    lead = f"Direction methods compared without a search, on {counts}; {found.layers} layers."
    tried = [_tried(selection)] if selection else []
    return Page(f"{model}: directions", lead, (advice, methods, *tried, alike, enough))


def _tried(selection: LayerSelection) -> PageSection:
    table = PageTable(HEAD_LAYERS, selection.rows())
    return PageSection("What each layer's direction does", (ABOUT_LAYERS,), (table,))


def _separation(found: MethodComparison) -> Plot:
    views = []
    for key, title, unit, axis in MEASURES:
        data = []
        for number, (name, rows) in enumerate(found.separation.items()):
            values = [None if row is None else row[key] for row in rows]
            data.append(numbered_line(name, list(range(found.layers)), four_digits(values), number))
        mark = vertical_rule(found.layer, f"layer {found.layer}")
        y = {"title": {"text": f"{title} ({unit})"}, **axis}
        views.append(view(title, data, "layer", y, **mark))
    note = "On held-out prompts, layer by layer. Tap a name to hide its line."
    return Plot("Telling the sets apart", note, views)


def _heat(found: MethodComparison) -> Plot:
    matrices = [("mean over layers", found.mean_cosines)]
    matrices += [(f"layer {index}", matrix) for index, matrix in enumerate(found.cosines)]
    views = [_cosines(label, list(found.methods), matrix, "") for label, matrix in matrices]
    return Plot("Cosines of methods", "", views, 1 + found.layer)


def _layers(found: MethodComparison) -> Plot:
    names = list(range(found.layers))
    one = _cosines("layers", names, found.layer_cosines, "layer")
    note = f"Of {found.advice.method}: one direction for all layers serves where these are near 1."
    return Plot("Cosines of layers", note, [one])


def _cosines(label: str, names: Sequence[Any], matrix: Any, axis: str) -> Figure:
    heat = {
        "type": "heatmap", "x": names, "y": names, "z": [four_digits(row) for row in matrix],
        "zmin": -1, "zmax": 1, "hoverongaps": False,
        "colorscale": [[0, "var(--warm)"], [0.5, "var(--paper)"], [1, "var(--cold)"]],
        "colorbar": {"thickness": 8, "outlinewidth": 0, "len": 0.6},
    }  # fmt: skip
    y = {"title": {"text": axis}, "autorange": "reversed"}
    return view(label, [heat], axis, y, height=480)


def _steadiness(found: MethodComparison) -> Plot:
    lines, views = [], []
    for number, (name, points) in enumerate(found.stability.items()):
        sizes = [point.prompts for point in points]
        means = numbered_line(
            name, sizes, four_digits(p.mean for p in points), number, mode="lines+markers"
        )
        lines.append(means)
        pairs = {
            "type": "scatter", "mode": "markers", "name": "one pair of samples",
            "x": [p.prompts for p in points for _ in p.cosines],
            "y": four_digits(c for p in points for c in p.cosines),
            "marker": {"color": "var(--muted)", "size": 6},
        }  # fmt: skip
        views.append((name, [means | {"name": "mean"}, pairs]))
    ticks = [point.prompts for point in next(iter(found.stability.values()))]
    x = {"title": {"text": "prompts of each set"}, "type": "log", "tickvals": ticks,
         "ticktext": [str(tick) for tick in ticks]}  # fmt: skip
    drawn = [
        view(label, data, x, "cosine of two directions")
        for label, data in [("all methods", lines), *views]
    ]
    return Plot("Cosine by the number of prompts", "", drawn)


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
