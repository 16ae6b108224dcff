"""Residuals of two sets as a page: planes and histograms over layers, and a table of geometry."""

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

BARS = 40
NAMES = ("behaviour", "neutral")
COLORS = ("var(--c1)", "var(--c0)")
GEOMETRY = (
    ("behaviour_norm", "behaviour norm"), ("neutral_norm", "neutral norm"), ("gap", "gap"),
    ("spread", "spread"), ("cosine", "cosine of means"), ("silhouette", "silhouette"),
    ("dimensions", "dimensions"),
)  # fmt: skip
MEASURES = (("auroc", "AUROC"), ("overlap", "overlap"), ("mutual_information", "bits"))
ABOUT_TABLE = (
    "Norms are mean lengths of residuals, the gap is the distance between the two means, the "
    "spread the root mean square distance from a residual's own mean, all in units of the residual "
    "stream. The silhouette is of all dimensions: how much nearer residuals lie to their own set "
    "(1) than to the other (-1). Dimensions: along how many directions residuals vary, about. "
    "AUROC, overlap and bits are of held-out prompts along the direction."
)
ABOUT_ASTRAY = (
    "Prompts that lie on the other set's side of the middle, along a direction found without them, "
    "at the best layer. Read them: a prompt that shows the behaviour in its words only, or one of "
    "the other set that shows it, blurs the direction. Beyond 1, a prompt lies farther over than "
    "the other set's mean."
)
LISTED = 20
"""Prompts that are listed at most."""
ABOUT_PLANES = (
    "Left, the two leading principal components of both sets together; right, the difference of "
    "means, and the leading component of what that leaves. A difference of means separates, in the "
    "picture on the right, even sets that don't differ, if prompts are few beside units: believe "
    "the histogram below, where every prompt is measured along a direction found without it."
)


def residuals_page(analysis: ResidualAnalysis, model: str, method: str) -> Page:
    """Return the page of the verb `residuals`.

    Args:
        analysis: A view of each layer, the best of them, and a trial's strengths.
        model: Name of the model.
        method: The method whose direction held-out prompts are measured along.
    """
    found, best = analysis.views, analysis.best
    strengths, trial = analysis.strengths, analysis.trial
    steps = [
        f"layer {one.layer}: AUROC {one.measures['auroc']:.3f}, "
        f"overlap {one.measures['overlap']:.0%}"
        for one in found
    ]
    planes = PageSection(
        "Layer by layer",
        (ABOUT_PLANES,),
        plots=(
            _planes("Principal components", found, "components"),
            _planes("The difference of means, and what varies beside it", found, "gap"),
            _histogram(found, method),
        ),
        steps=steps,
        start=best,
    )
    where = PageSection(
        "Where the behaviour shows" + (f", and where trial {trial} edits" if strengths else ""),
        plots=(_separation(found, best, strengths, trial), _norms(found), _cosine(found)),
    )
    first = found[0]
    table = PageSection("Geometry", (ABOUT_TABLE,), (geometry_table(found),))
    lead = (
        f"Residuals of {first.first} prompts that show the behaviour and "
        f"{len(first.components) - first.first} that don't, at the last token, after every block."
    )
    return Page(f"{model}: residuals", lead, (where, planes, _astray(found[best]), table))


def geometry_table(found: Sequence[LayerView]) -> PageTable:
    """A row a layer."""
    head = ("layer", *(title for _, title in GEOMETRY), *(title for _, title in MEASURES))
    rows = []
    for one in found:
        values = asdict(one.geometry)
        rows.append(
            [str(one.layer), *(f"{values[key]:.3g}" for key, _ in GEOMETRY)]
            + [f"{one.measures[key]:.3f}" for key, _ in MEASURES]
        )
    return PageTable(head, rows)


def _astray(one: LayerView) -> PageSection:
    found = misplaced_prompts(one)
    title = f"Prompts that lie with the other set: {len(found)} of {len(one.components)}"
    rows = [(name, str(number), f"{beyond:.2f}") for name, number, beyond in found[:LISTED]]
    tables = (PageTable(("set", "prompt", "beyond the middle"), rows),) if rows else ()
    return PageSection(title, (ABOUT_ASTRAY,), tables)


def _planes(title: str, found: Sequence[LayerView], kind: str) -> Plot:
    views = []
    for one in found:
        plane: Plane = getattr(one, kind)
        shares: tuple[float, float] = getattr(one, f"{kind}_shares")
        parts = plane[: one.first], plane[one.first :]
        data = [
            _cloud(name, part, color)
            for name, part, color in zip(NAMES, parts, COLORS, strict=True)
        ]
        first = "component 1" if kind == "components" else "along the difference of means"
        second = "component 2" if kind == "components" else "leading component of the rest"
        axes = [
            f"{text} ({share:.0%} of variance)"
            for text, share in zip((first, second), shares, strict=True)
        ]
        views.append(view(f"layer {one.layer}", data, axes[0], axes[1]))
    return Plot(title, "", views, stepped=True)


def _cloud(name: str, part: Plane, color: str) -> Figure:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": four_digits(part[:, 0]),
        "y": four_digits(part[:, 1]), "marker": {"color": color, "size": 6, "opacity": 0.7},
        "hovertemplate": f"{name}, prompt %{{pointNumber}}<extra></extra>",
    }  # fmt: skip


def _histogram(found: Sequence[LayerView], method: str) -> Plot:
    views = []
    for one in found:
        data: list[Figure] = []
        if one.held_out is not None:
            both = one.held_out.behaviour, one.held_out.neutral
            edges = numpy.histogram_bin_edges(numpy.concatenate(both), BARS)
            middles = four_digits(0.5 * (edges[1:] + edges[:-1]))
            for name, part, color in zip(NAMES, both, COLORS, strict=True):
                shares = numpy.histogram(part, edges)[0] / len(part)
                bars = {"type": "bar", "name": name, "x": middles, "y": four_digits(shares)}
                data.append(bars | {"marker": {"color": color, "opacity": 0.6}})
        x = "along the direction (units of the residual stream)"
        more = {"barmode": "overlay", "bargap": 0}
        views.append(view(f"layer {one.layer}", data, x, "share of the prompts", **more))
    note = (
        f"Every prompt along the {method} direction of the other half of the prompts. A layer "
        "without bars has no direction."
    )
    return Plot("Held-out prompts along the direction", note, views, stepped=True)


def _separation(
    found: Sequence[LayerView],
    best: int,
    strengths: Mapping[str, Sequence[float]],
    trial: int | None,
) -> Plot:
    layers = [one.layer for one in found]
    data = [
        numbered_line(title, layers, four_digits(one.measures[key] for one in found), number)
        for number, (key, title) in enumerate(MEASURES)
    ]
    data.append(
        numbered_line("silhouette", layers, four_digits(o.geometry.silhouette for o in found), 3)
    )
    more: dict[str, Any] = vertical_rule(best, f"best layer {best}")
    if strengths:
        for number, (name, values) in enumerate(strengths.items(), start=4):
            bars = {
                "type": "bar",
                "name": f"{name}, strength",
                "x": layers,
                "y": four_digits(values),
            }
            mark = {"color": f"var(--c{number % 6})", "opacity": 0.35}
            data.append(bars | {"marker": mark, "yaxis": "y2"})
        title = {"text": f"strength of trial {trial}"}
        top = max(1.0, *(max(values) for values in strengths.values()))
        more["yaxis2"] = {
            "title": title, "overlaying": "y", "side": "right", "showgrid": False,
            "tickmode": "auto", "range": [-0.05 * top, 1.05 * top],
        }  # fmt: skip
    y = {"title": {"text": "separation"}, "range": [-0.05, 1.05]}
    note = "AUROC, overlap and bits of held-out prompts along the direction"
    note += "; bars: how strongly each component is edited." if strengths else "."
    return Plot("Separation over layers", note, [view("separation", data, "layer", y, **more)])


def _norms(found: Sequence[LayerView]) -> Plot:
    layers = [one.layer for one in found]
    data = []
    for number, (key, title) in enumerate(GEOMETRY[:4]):
        values = [getattr(one.geometry, key) for one in found]
        least = 1e-6 * max(values)  # rounding of nothing, which a log scale would dwell on
        known = four_digits(value if value > least else None for value in values)
        data.append(numbered_line(title, layers, known, number))
    y = {"title": {"text": "length (log scale)"}, "type": "log"}
    return Plot("Lengths", "", [view("lengths", data, "layer", y)])


def _cosine(found: Sequence[LayerView]) -> Plot:
    values = four_digits(one.geometry.cosine for one in found)
    data = [numbered_line("cosine of means", [one.layer for one in found], values, 0)]
    return Plot("Angle between the two means", "", [view("cosine", data, "layer", "cosine")])
