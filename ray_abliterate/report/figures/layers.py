"""Figures over the layers: where plans edit, and where the behaviour shows."""

import math
from collections.abc import Mapping, Sequence

from ray_abliterate.pipeline.directory import Baseline
from ray_abliterate.report.figures.plotly_parts import (
    Figure,
    figure,
    line,
    log_ticks,
    vertical_rule,
    view,
)
from ray_abliterate.report.run_data import RunData, escaped
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score_text import number_text


def strengths_of(plan: Plan, layers: int) -> dict[str, list[float]]:
    """Strength of every layer by component, to four digits."""
    return {
        name: [float(f"{value:.4g}") for value in plan.strengths(name, layers)]
        for name, _ in plan.profiles
    }


def strength_figure(run: RunData) -> Figure:
    """Strength over layers of the two models that are compared; the page fills it in."""
    title, note = "Strength over layers", "How strongly each component is edited, layer by layer."
    if not run.layers or not run.frontier:
        return figure(title, note, [])
    layers = list(range(run.layers))
    every = [t.plan for t in run.trials if t.scorecard is not None]
    top = max(s for p in every for name, _ in p.profiles for s in p.strengths(name, run.layers))
    y = {"title": {"text": "strength (1 removes the direction)"}, "range": [0, 1.05 * top or 1]}
    names = dict.fromkeys(name for plan in every for name, _ in plan.profiles)
    data = [line(name, layers, [], f"c{place % 6}") for place, name in enumerate(names)]
    return figure(title, note, [view("strengths", data, "layer", y)])


def members_figure(run: RunData) -> Figure:
    """Strength over layers of all members of the frontier, a row for each."""
    title = "Where the frontier edits"
    note = "Strength over layers, a row for each member of the frontier, the best rate at the top."
    members = run.frontier.members
    if not run.layers or len(members) < 2:
        return figure(title, note, [])
    names = dict.fromkeys(name for member in members for name, _ in member.plan.profiles)
    first = members[0].scorecard
    assert first is not None
    note = note.replace("the best rate", f"the best {first.objectives[0].name}")
    rows = [f"trial {m.number}" for m in members]
    values = {name: [m.plan.strengths(name, run.layers) for m in members] for name in names}
    top = max(max(row) for table in values.values() for row in table) or 1.0
    views = [_heat(name, rows, table, top) for name, table in values.items()]
    return figure(title, note, views, _heat_told(rows, values))


def _heat(name: str, rows: list[str], table: Sequence[Sequence[float]], top: float) -> Figure:
    bar = {"title": {"text": "strength", "font": {"size": 13}}, "thickness": 8, "outlinewidth": 0}
    data = {
        "type": "heatmap",
        "name": escaped(name),
        "x": list(range(len(table[0]))),
        "y": rows,
        "z": [[float(f"{value:.4g}") for value in row] for row in table],
        "zmin": 0,
        "zmax": top,
        "colorscale": [[0, "var(--panel)"], [1, "var(--late)"]],
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "%{y}, layer %{x}: %{z}<extra></extra>",
    }
    y = {"title": {"text": ""}, "autorange": "reversed", "type": "category", "dtick": 1}
    return view(name, [data], "layer", y, height=110 + 22 * len(rows))


def _heat_told(rows: list[str], values: Mapping[str, Sequence[Sequence[float]]]) -> str:
    texts = []
    for name, table in values.items():
        peaks = [row.index(max(row)) for row in table if max(row) > 0]
        where = f"between layers {min(peaks)} and {max(peaks)}" if peaks else "nowhere"
        texts.append(f"{name} is edited most {where}")
    return f"{len(rows)} members: {'; '.join(texts)}."


SEPARATION = (
    ("auroc", "Telling the sets apart", "AUROC (0.5: by chance)", ("auroc",)),
    ("fisher", "Distance between the sets", "Fisher ratio", ("fisher",)),
    ("silhouette", "Nearness to the own set", "silhouette (-1 to 1)", ("silhouette",)),
    ("mutual_information", "What a projection tells", "bits, of 1", ("mutual_information",)),
    ("cosine", "Angle between the two means", "cosine", ("cosine",)),
    ("norms", "Lengths", "norm (log scale)", ("behaviour_norm", "neutral_norm", "direction_norm")),
)


def separation_figures(base: Baseline | None) -> dict[str, Figure]:
    """How well each layer tells the prompt sets apart."""
    figures = {}
    for key, title, unit, columns in SEPARATION:
        views, told = [], ""
        if base and any(set(columns) <= set(row) for row in base.separation):
            layers = [row["layer"] for row in base.separation]
            data = []
            for index, column in enumerate(columns):
                values = [row.get(column, math.nan) for row in base.separation]
                known = [value if math.isfinite(value) else None for value in values]
                data.append(line(column.replace("_", " "), layers, known, f"c{index}"))
            told = " ".join(_reach(one) for one in data)
            above = [v for one in data for v in one["y"] if v is not None and v > 0]
            y: Figure = {"title": {"text": unit}}
            if key == "norms" and above:
                ticks = log_ticks(min(above), max(above))
                y |= {"type": "log", "tickvals": ticks, "ticktext": [*map(number_text, ticks)]}
            mark = vertical_rule(base.best_layer, f"best layer {base.best_layer}")
            views = [view(title, data, "layer", y, **mark)]
        figures[key] = figure(title, "", views, told)
    return figures


def _reach(one: Figure) -> str:
    """From where to where a line goes."""
    known = [(y, x) for x, y in zip(one["x"], one["y"], strict=True) if y is not None]
    if not known:
        return ""
    (low, at_low), (high, at_high) = min(known), max(known)
    low_text, high_text = number_text(low), number_text(high)
    return f"{one['name']} from {low_text} at layer {at_low} to {high_text} at layer {at_high}."
