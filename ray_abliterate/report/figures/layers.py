"""Draw figures over layers: where plans edit, and where the behaviour shows."""

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
from ray_abliterate.report.run_data import RunData, escape_text
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score_text import number_text


def strengths_of(plan: Plan, layers: int) -> dict[str, list[float]]:
    """Return a plan's strength at each layer by component, to four digits."""
    return {
        name: [float(f"{value:.4g}") for value in plan.strengths(name, layers)]
        for name, _ in plan.profiles
    }


def strength_figure(run: RunData) -> Figure:
    """Return the axes of strength over layers; the page draws the two models it compares."""
    title, note = "Strength over layers", "How strongly each component is edited, layer by layer."
    if not run.layers or not run.frontier:
        return figure(title, note, [])
    layers = list(range(run.layers))
    plans = [t.plan for t in run.trials if t.scorecard is not None]
    top = max(s for p in plans for name, _ in p.profiles for s in p.strengths(name, run.layers))
    y = {"title": {"text": "strength (1 removes the direction)"}, "range": [0, 1.05 * top or 1]}
    names = dict.fromkeys(name for plan in plans for name, _ in plan.profiles)
    data = [line(name, layers, [], f"c{place % 6}") for place, name in enumerate(names)]
    return figure(title, note, [view("strengths", data, "layer", y)])


def members_figure(run: RunData) -> Figure:
    """Return heatmaps of strength over layers, a row per trial of the frontier."""
    title = "Where the frontier edits"
    note = "Strength over layers, a row per trial of the frontier, the best rate at the top."
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
    return figure(title, note, views, _heat_alt_text(rows, values))


def _heat(name: str, rows: list[str], table: Sequence[Sequence[float]], top: float) -> Figure:
    bar = {"title": {"text": "strength", "font": {"size": 13}}, "thickness": 8, "outlinewidth": 0}
    data = {
        "type": "heatmap",
        "name": escape_text(name),
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


def _heat_alt_text(rows: list[str], values: Mapping[str, Sequence[Sequence[float]]]) -> str:
    texts = []
    for name, table in values.items():
        peaks = [row.index(max(row)) for row in table if max(row) > 0]
        where = f"between layers {min(peaks)} and {max(peaks)}" if peaks else "nowhere"
        texts.append(f"{name} is edited most {where}")
    return f"{len(rows)} trials: {'; '.join(texts)}."


SEPARATION = (
    ("auroc", "Separation of the sets", "AUROC (0.5: by chance)", ("auroc",)),
    ("fisher", "Distance between the sets", "Fisher ratio", ("fisher",)),
    ("silhouette", "Closeness to the own set", "silhouette (-1 to 1)", ("silhouette",)),
    ("mutual_information", "Information in a projection", "bits, of 1", ("mutual_information",)),
    ("cosine", "Angle between the two means", "cosine", ("cosine",)),
    ("norms", "Lengths", "norm (log scale)", ("behaviour_norm", "neutral_norm", "direction_norm")),
)


def separation_figures(base: Baseline | None) -> dict[str, Figure]:
    """Return figures of how well each layer separates the prompt sets."""
    figures = {}
    for key, title, unit, columns in SEPARATION:
        views, alt = [], ""
        if base and any(set(columns) <= set(row) for row in base.separation):
            layers = [row["layer"] for row in base.separation]
            data = []
            for index, column in enumerate(columns):
                values = [row.get(column, math.nan) for row in base.separation]
                known = [value if math.isfinite(value) else None for value in values]
                data.append(line(column.replace("_", " "), layers, known, f"c{index}"))
            alt = " ".join(_range_text(trace) for trace in data)
            positive = [v for trace in data for v in trace["y"] if v is not None and v > 0]
            y: Figure = {"title": {"text": unit}}
            if key == "norms" and positive:
                ticks = log_ticks(min(positive), max(positive))
                y |= {"type": "log", "tickvals": ticks, "ticktext": [*map(number_text, ticks)]}
            mark = vertical_rule(base.best_layer, f"best layer {base.best_layer}")
            views = [view(title, data, "layer", y, **mark)]
        figures[key] = figure(title, "", views, alt)
    return figures


def _range_text(trace: Figure) -> str:
    """Return the lowest and the highest value of a line, with their layers."""
    known = [(y, x) for x, y in zip(trace["x"], trace["y"], strict=True) if y is not None]
    if not known:
        return ""
    (low, at_low), (high, at_high) = min(known), max(known)
    low_text, high_text = number_text(low), number_text(high)
    return f"{trace['name']} from {low_text} at layer {at_low} to {high_text} at layer {at_high}."
