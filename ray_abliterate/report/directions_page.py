"""Build the page of the verb `directions`, and the rows of its tables."""

import math
from collections.abc import Sequence
from typing import Any

from ray_abliterate.directions.comparison.compare import MethodComparison
from ray_abliterate.directions.layer_selection import TABLE_HEADER, LayerSelection
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
    "Each method at its own best layer (by the Fisher ratio, without the last fifth of the "
    "layers), on held-out prompts: each half of the prompts is measured along the direction of the "
    "other half. “Halves' cosine” is that of the two halves' directions; “to the truth” is the "
    "estimated cosine of the direction from all prompts with the one from infinitely many."
)
ABOUT_LAYERS = (
    "Log-odds (nats) that answers begin as refusals do: for held-out prompts that show the "
    "behaviour, with the direction removed from all weights; for neutral ones, with the direction "
    "added after its layer. The divergence from the base model is that of neutral prompts, with "
    "the direction removed."
)


def method_rows(comparison: MethodComparison) -> list[list[str]]:
    """Return a row of texts per method: best layer, measures on held-out prompts, stability."""
    rows = []
    for name in comparison.methods:
        best = comparison.best(name)
        error = auroc_error(best["auroc"], *comparison.counts)
        rows.append(
            [name, f"{best['layer']:.0f}", f"{best['auroc']:.3f} ± {error:.3f}"]
            + [_text(best[key]) for key, _ in COLUMNS]
            + [_text(comparison.reliability_of(name))]
        )
    return rows


def cosine_rows(comparison: MethodComparison) -> list[list[str]]:
    """Return a row of cosines per method, at the layer where samples were drawn."""
    matrix = comparison.cosines[comparison.layer]
    return [
        [name, *(_text(value) for value in matrix[index])]
        for index, name in enumerate(comparison.methods)
    ]


def stability_rows(comparison: MethodComparison) -> tuple[list[str], list[list[str]]]:
    """Return the sizes of samples as headings, and a row of mean cosines per method."""
    sizes = [point.prompts for point in next(iter(comparison.stability.values()))]
    rows = [
        [name, *(_text(point.mean) for point in points)]
        for name, points in comparison.stability.items()
    ]
    return [f"{size} prompts" for size in sizes], rows


def directions_page(
    comparison: MethodComparison, model: str, selection: LayerSelection | None = None
) -> Page:
    """Return the page of the verb `directions`.

    Args:
        comparison: Methods, compared on held-out prompts.
        model: Name of the model.
        selection: What each layer's direction does, if that was measured.
    """
    layer, advice, counts = comparison.layer, comparison.advice, comparison.counts
    sizes, rows = stability_rows(comparison)
    chosen_layer = (selection.sentence(),) if selection else ()
    recommendation = PageSection(f"Take {advice.method}", (*advice.reasons, *chosen_layer))
    failed = [
        f"{name} has no direction here: {reason}" for name, reason in comparison.failed.items()
    ]
    methods = PageSection(
        "Methods",
        (ABOUT_METHODS, *failed),
        (PageTable(METHODS_HEADER, method_rows(comparison)),),
        (_separation(comparison),),
    )
    similarity = PageSection(
        "How similar their directions are",
        ("Methods with cosines near 1 give the same direction, and searches that end alike.",),
        (
            PageTable(
                ("method", *comparison.methods),
                cosine_rows(comparison),
                f"Cosines at layer {layer}",
            ),
        ),
        (_heat(comparison), _layers(comparison)),
    )
    stability = PageSection(
        "Whether there are enough prompts",
        (
            f"Cosines of two directions at layer {layer} from samples that share no prompt, "
            "with this many of each set. Where they still rise at the right end, more would help.",
        ),
        (PageTable(("method", *sizes), rows, "Mean cosine"),),
        (_stability(comparison),),
    )
    prompts = f"{counts[0]} prompts that show the behaviour and {counts[1]} that don't"
    lead = f"Direction methods compared without a search, on {prompts}; {comparison.layers} layers."
    effects = [_layer_effects(selection)] if selection else []
    return Page(
        f"{model}: directions", lead, (recommendation, methods, *effects, similarity, stability)
    )


def _layer_effects(selection: LayerSelection) -> PageSection:
    table = PageTable(TABLE_HEADER, selection.rows())
    return PageSection("What each layer's direction does", (ABOUT_LAYERS,), (table,))


def _separation(comparison: MethodComparison) -> Plot:
    views = []
    for key, title, unit, axis in MEASURES:
        data = []
        for number, (name, rows) in enumerate(comparison.separation.items()):
            values = [None if row is None else row[key] for row in rows]
            data.append(
                numbered_line(name, list(range(comparison.layers)), four_digits(values), number)
            )
        mark = vertical_rule(comparison.layer, f"layer {comparison.layer}")
        y = {"title": {"text": f"{title} ({unit})"}, **axis}
        views.append(view(title, data, "layer", y, **mark))
    note = "On held-out prompts, layer by layer. Tap a name to hide its line."
    return Plot("Separation of the sets", note, views)


def _heat(comparison: MethodComparison) -> Plot:
    matrices = [("mean over layers", comparison.mean_cosines)]
    matrices += [(f"layer {index}", matrix) for index, matrix in enumerate(comparison.cosines)]
    views = [_cosines(label, list(comparison.methods), matrix, "") for label, matrix in matrices]
    return Plot("Cosines of methods", "", views, 1 + comparison.layer)


def _layers(comparison: MethodComparison) -> Plot:
    names = list(range(comparison.layers))
    matrix = _cosines("layers", names, comparison.layer_cosines, "layer")
    note = (
        f"Of {comparison.advice.method}: where these are near 1, one direction serves all layers."
    )
    return Plot("Cosines of layers", note, [matrix])


def _cosines(label: str, names: Sequence[Any], matrix: Any, axis: str) -> Figure:
    heat = {
        "type": "heatmap", "x": names, "y": names, "z": [four_digits(row) for row in matrix],
        "zmin": -1, "zmax": 1, "hoverongaps": False,
        "colorscale": [[0, "var(--warm)"], [0.5, "var(--paper)"], [1, "var(--cold)"]],
        "colorbar": {"thickness": 8, "outlinewidth": 0, "len": 0.6},
    }  # fmt: skip
    y = {"title": {"text": axis}, "autorange": "reversed"}
    return view(label, [heat], axis, y, height=480)


def _stability(comparison: MethodComparison) -> Plot:
    lines, views = [], []
    for number, (name, points) in enumerate(comparison.stability.items()):
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
    ticks = [point.prompts for point in next(iter(comparison.stability.values()))]
    x = {"title": {"text": "prompts of each set"}, "type": "log", "tickvals": ticks,
         "ticktext": [str(tick) for tick in ticks]}  # fmt: skip
    drawn = [
        view(label, data, x, "cosine of two directions")
        for label, data in [("all methods", lines), *views]
    ]
    return Plot("Cosine by the number of prompts", "", drawn)


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
