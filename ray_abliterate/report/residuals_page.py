"""Build the page of the verb `residuals`: planes and histograms by layer, and their geometry."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy

from ray_abliterate.directions.geometry import Plane
from ray_abliterate.directions.layer_views import LayerView, misplaced_prompts
from ray_abliterate.pipeline.residual_analysis import ResidualAnalysis
from ray_abliterate.report.figures.plotly_parts import (
    Figure,
    four_digits,
    numbered_line,
    vertical_rule,
    view,
)
from ray_abliterate.report.page import Page, PageSection, PageTable, Plot

HISTOGRAM_BINS = 40
SETS = ("behaviour", "neutral")
SET_COLORS = ("var(--c1)", "var(--c0)")
GEOMETRY = (
    ("behaviour_norm", "behaviour norm"), ("neutral_norm", "neutral norm"), ("gap", "gap"),
    ("spread", "spread"), ("cosine", "cosine of means"), ("silhouette", "silhouette"),
    ("dimensions", "dimensions"),
)  # fmt: skip
MEASURES = (("auroc", "AUROC"), ("overlap", "overlap"), ("mutual_information", "bits"))
ABOUT_TABLE = (
    "Norms are mean lengths of residuals, the gap is the distance between the two means, and the "
    "spread is the root mean square distance of residuals from their own set's mean, all in units "
    "of the residual stream. The silhouette is computed in all dimensions: how much nearer "
    "residuals lie to their own set (1) than to the other (-1). Dimensions: in about how many "
    "directions residuals vary. AUROC, overlap and bits are those of held-out prompts along the "
    "direction."
)
ABOUT_MISPLACED = (
    "These prompts lie on the other set's side of the middle at the best layer, along a direction "
    "that was computed without them. Read them: a prompt that shows the behaviour in its words "
    "only, or a neutral one that does show it, blurs the direction. Beyond 1, a prompt lies "
    "farther over than the other set's mean."
)
MOST_LISTED = 20
"""Misplaced prompts that are listed at most."""
ABOUT_PLANES = (
    "Left, the two leading principal components of both sets together; right, the difference of "
    "means, and the leading component of what remains without it. With few prompts in many "
    "dimensions a difference of means separates even sets that do not differ, as the right picture "
    "would show: trust the histogram below, where each prompt is measured along a direction that "
    "was computed without it."
)


def residuals_page(analysis: ResidualAnalysis, model: str, method: str) -> Page:
    """Return the page of the verb `residuals`.

    Args:
        analysis: A view of each layer, the best of them, and a trial's strengths.
        model: Name of the model.
        method: The method whose direction held-out prompts are measured along.
    """
    layers, strengths = analysis.views, analysis.strengths
    steps = [
        f"layer {layer.layer}: AUROC {layer.measures['auroc']:.3f}, "
        f"overlap {layer.measures['overlap']:.0%}"
        for layer in layers
    ]
    planes = PageSection(
        "Layer by layer",
        (ABOUT_PLANES,),
        plots=(
            _planes("Principal components", layers, "components"),
            _planes("Difference of means, and what varies besides", layers, "gap"),
            _histogram(layers, method),
        ),
        steps=steps,
        start=analysis.best,
    )
    edits = f", and where trial {analysis.trial} edits" if strengths else ""
    overview = PageSection(
        f"Where the behaviour shows{edits}",
        plots=(_separation(analysis), _norms(layers), _cosine(layers)),
    )
    table = PageSection("Geometry", (ABOUT_TABLE,), (geometry_table(layers),))
    first = layers[0]
    lead = (
        f"Residuals of {first.first} prompts that show the behaviour and "
        f"{len(first.components) - first.first} that don't, at the last token, after every block."
    )
    misplaced = _misplaced(layers[analysis.best])
    return Page(f"{model}: residuals", lead, (overview, planes, misplaced, table))


def geometry_table(layers: Sequence[LayerView]) -> PageTable:
    """Return a table of geometry and separation with a row per layer."""
    header = ("layer", *(title for _, title in GEOMETRY), *(title for _, title in MEASURES))
    rows = []
    for layer in layers:
        values = asdict(layer.geometry)
        rows.append(
            [str(layer.layer), *(f"{values[key]:.3g}" for key, _ in GEOMETRY)]
            + [f"{layer.measures[key]:.3f}" for key, _ in MEASURES]
        )
    return PageTable(header, rows)


def _misplaced(layer: LayerView) -> PageSection:
    """Return the list of prompts that lie with the other set, the farthest first."""
    prompts = misplaced_prompts(layer)
    title = f"Prompts that lie with the other set: {len(prompts)} of {len(layer.components)}"
    rows = [(name, str(number), f"{beyond:.2f}") for name, number, beyond in prompts[:MOST_LISTED]]
    tables = (PageTable(("set", "prompt", "beyond the middle"), rows),) if rows else ()
    return PageSection(title, (ABOUT_MISPLACED,), tables)


def _planes(title: str, layers: Sequence[LayerView], kind: str) -> Plot:
    """Return both sets projected onto a plane, a view per layer.

    Args:
        title: Heading of the plot.
        layers: What is shown.
        kind: `components` or `gap`, a plane of `LayerView`.
    """
    first = "component 1" if kind == "components" else "along the difference of means"
    second = "component 2" if kind == "components" else "leading component of the rest"
    views = []
    for layer in layers:
        plane: Plane = getattr(layer, kind)  # (prompt, axis), the behaviour's prompts first
        shares: tuple[float, float] = getattr(layer, f"{kind}_shares")
        parts = plane[: layer.first], plane[layer.first :]
        data = [
            _cloud(name, part, color)
            for name, part, color in zip(SETS, parts, SET_COLORS, strict=True)
        ]
        axes = [
            f"{text} ({share:.0%} of variance)"
            for text, share in zip((first, second), shares, strict=True)
        ]
        views.append(view(f"layer {layer.layer}", data, axes[0], axes[1]))
    return Plot(title, "", views, stepped=True)


def _cloud(name: str, part: Plane, color: str) -> Figure:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": four_digits(part[:, 0]),
        "y": four_digits(part[:, 1]), "marker": {"color": color, "size": 6, "opacity": 0.7},
        "hovertemplate": f"{name}, prompt %{{pointNumber}}<extra></extra>",
    }  # fmt: skip


def _histogram(layers: Sequence[LayerView], method: str) -> Plot:
    """Return histograms of held-out prompts along the direction, a view per layer."""
    views = []
    for layer in layers:
        data: list[Figure] = []
        if layer.held_out is not None:
            parts = layer.held_out.behaviour, layer.held_out.neutral
            edges = numpy.histogram_bin_edges(numpy.concatenate(parts), HISTOGRAM_BINS)
            middles = four_digits(0.5 * (edges[1:] + edges[:-1]))
            for name, part, color in zip(SETS, parts, SET_COLORS, strict=True):
                shares = numpy.histogram(part, edges)[0] / len(part)
                bars = {"type": "bar", "name": name, "x": middles, "y": four_digits(shares)}
                data.append(bars | {"marker": {"color": color, "opacity": 0.6}})
        x = "along the direction (units of the residual stream)"
        overlaid = {"barmode": "overlay", "bargap": 0}
        views.append(view(f"layer {layer.layer}", data, x, "share of the prompts", **overlaid))
    note = (
        f"Every prompt along the {method} direction of the other half of the prompts. A layer "
        "without bars has no direction."
    )
    return Plot("Held-out prompts along the direction", note, views, stepped=True)


def _separation(analysis: ResidualAnalysis) -> Plot:
    """Return measures of separation over layers, and a trial's strengths as bars behind them."""
    layers = [layer.layer for layer in analysis.views]
    data = [
        numbered_line(
            title, layers, four_digits(layer.measures[key] for layer in analysis.views), number
        )
        for number, (key, title) in enumerate(MEASURES)
    ]
    silhouettes = four_digits(layer.geometry.silhouette for layer in analysis.views)
    data.append(numbered_line("silhouette", layers, silhouettes, 3))
    layout: dict[str, Any] = vertical_rule(analysis.best, f"best layer {analysis.best}")
    if analysis.strengths:
        data += _strength_bars(layers, analysis.strengths)
        top = max(1.0, *(max(values) for values in analysis.strengths.values()))
        layout["yaxis2"] = {
            "title": {"text": f"strength of trial {analysis.trial}"}, "overlaying": "y",
            "side": "right", "showgrid": False, "tickmode": "auto",
            "range": [-0.05 * top, 1.05 * top],
        }  # fmt: skip
    y = {"title": {"text": "separation"}, "range": [-0.05, 1.05]}
    note = "AUROC, overlap and bits of held-out prompts along the direction"
    note += "; bars: how strongly each component is edited." if analysis.strengths else "."
    return Plot("Separation over layers", note, [view("separation", data, "layer", y, **layout)])


def _strength_bars(layers: Sequence[int], strengths: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Return bars of each component's strength, on a second axis."""
    bars = []
    for number, (name, values) in enumerate(strengths.items(), start=4):
        trace = {"type": "bar", "name": f"{name}, strength", "x": layers}
        mark = {"color": f"var(--c{number % 6})", "opacity": 0.35}
        bars.append(trace | {"y": four_digits(values), "marker": mark, "yaxis": "y2"})
    return bars


def _norms(layers: Sequence[LayerView]) -> Plot:
    """Return norms, gap and spread over layers, on a logarithmic scale."""
    data = []
    for number, (key, title) in enumerate(GEOMETRY[:4]):
        values = [getattr(layer.geometry, key) for layer in layers]
        least = 1e-6 * max(values)  # what is smaller is rounding, and would stretch a log scale
        lengths = four_digits(value if value > least else None for value in values)
        data.append(numbered_line(title, [layer.layer for layer in layers], lengths, number))
    y = {"title": {"text": "length (log scale)"}, "type": "log"}
    return Plot("Lengths", "", [view("lengths", data, "layer", y)])


def _cosine(layers: Sequence[LayerView]) -> Plot:
    """Return the cosine between the means of both sets over layers."""
    values = four_digits(layer.geometry.cosine for layer in layers)
    data = [numbered_line("cosine of means", [layer.layer for layer in layers], values, 0)]
    return Plot("Angle between the two means", "", [view("cosine", data, "layer", "cosine")])
