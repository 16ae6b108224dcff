"""Draw what suites measured: along the frontier, and item by item."""

from collections.abc import Mapping, Sequence

from ray_abliterate.pipeline.suite_results import BASE, label
from ray_abliterate.report.figures.plotly_parts import Axis, Figure, figure, line, marks, view
from ray_abliterate.report.run_data import (
    RunData,
    escape_text,
    finding_texts,
    model_text,
    title_text,
)
from ray_abliterate.report.suite_summary import Curve
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Score
from ray_abliterate.search.score_text import number_text

MOST_CURVES = 4
"""Models whose curves are drawn: the base model, the knee and both ends of the frontier, or others
if these were not measured."""


def validation_figures(run: RunData) -> dict[str, Figure]:
    """Return figures of suites' scores along the frontier, and as items were measured."""
    along = [drawn for name in run.suites.names for drawn in _along(run, name)]
    curves = [
        _curves(run, name, models)
        for name, models in run.suites.curves.items()
        if max(len(curve) for curve in models.values()) > 1
    ]
    first = run.objectives[-1].name if run.objectives else ""
    note = (
        f"Each measured trial at its {first}, with the 95\u00a0% interval of the suite; the band "
        "is the base model's."
    )
    by_items = (
        "The score after so many items, in the order in which they were measured: the base model, "
        "the knee, and the ends of the frontier."
    )
    return {
        "validation": figure("Along the frontier", note, along, _alt_text(run)),
        "curves": figure("Score by number of items", by_items, curves, _curves_alt_text(run)),
    }


def _measured(run: RunData, name: str) -> list[tuple[Trial, Score]]:
    """Return finished trials that a suite scored, with the scores."""
    measured = []
    for trial, _ in run.finished:
        finding = run.suites.of(trial).get(name)
        if finding is not None and finding.score is not None:
            measured.append((trial, finding.score))
    return measured


def _along(run: RunData, name: str) -> list[Figure]:
    """Return the view of one suite over the last objective; nothing if it measured no trial."""
    trials = _measured(run, name)
    if not trials or not run.objectives:
        return []
    along = run.objectives[-1]
    cards = [trial.scorecard for trial, _ in trials]
    objectives = [card[along.name] for card in cards if card is not None]
    axis = Axis(objectives, log=True)
    scores = [score for _, score in trials]
    hover = []
    for trial, _ in trials:
        text, difference = finding_texts(run.suites.of(trial)[name])
        suffix = f"<br>{escape_text(difference)} from the base model" if difference else ""
        hover.append(f"<b>trial {trial.number}</b><br>{escape_text(f'{name} {text}')}{suffix}")
    x = [axis.place(score.value) for score in objectives]
    mark = {"size": 10, "color": "var(--c0)"}
    points = marks("trials", x, [score.value for score in scores], hover, mark)
    points |= Axis(scores, log=False).error_bars(scores, "y", "c0")
    points["customdata"] = [str(trial.number) for trial, _ in trials]
    base = run.suites.of(None).get(name)
    layout = _band(base.score) if base is not None and base.score is not None else {}
    return [view(name, [points], axis.layout(title_text(along)), title_text(scores[0]), **layout)]


def _band(base: Score) -> Figure:
    """Return the base model's score and interval, as a band across the figure."""
    across = {"xref": "paper", "x0": 0, "x1": 1}
    band = {"type": "rect", "y0": base.low, "y1": base.high, "opacity": 0.25, "layer": "below"}
    band |= {"fillcolor": "var(--muted)", "line": {"width": 0}}
    mid = {"type": "line", "y0": base.value, "y1": base.value}
    mid |= {"line": {"color": "var(--muted)", "width": 1, "dash": "dash"}}
    text = {"xref": "paper", "x": 1, "y": base.value, "xanchor": "right", "yanchor": "bottom"}
    text |= {"text": "base model", "showarrow": False, "font": {"color": "var(--muted)"}}
    return {"shapes": [band | across, mid | across], "annotations": [text]}


def _curves(run: RunData, name: str, models: Mapping[str, Curve]) -> Figure:
    wanted = [BASE]
    if run.frontier:
        ends = run.frontier.members[0], run.frontier.members[-1]
        wanted += [label(trial.number) for trial in (run.frontier.knee, *ends)]
    shown = [model for model in dict.fromkeys([*wanted, *models]) if model in models][:MOST_CURVES]
    colors = dict.fromkeys(shown, "c0") | {BASE: "base", wanted[-1]: "c2"}
    colors |= {wanted[1]: "knee"} if run.frontier else {}
    data = [_curve(model_text(model), models[model], colors[model]) for model in shown]
    score = models[shown[0]][-1][1]
    x = {"title": {"text": "items measured"}, "rangemode": "tozero"}
    return view(name, data, x, title_text(score))


def _curve(model: str, curve: Curve, color: str) -> Figure:
    items, scores = [count for count, _ in curve], [score for _, score in curve]
    drawn = line(model, items, [score.value for score in scores], color)
    texts: Sequence[str] = [
        f"<b>{escape_text(model)}</b>, {count} items<br>{number_text(score.value)} "
        f"[{number_text(score.low)}, {number_text(score.high)}]"
        for count, score in curve
    ]
    return drawn | {"mode": "lines+markers", "text": texts, "hoverinfo": "text"}


def _alt_text(run: RunData) -> str:
    """Return every measured score in words."""
    texts = []
    for name in run.suites.names:
        scores = [
            f"{model_text(model)} {finding_texts(findings[name])[0]}"
            for model, findings in run.suites.findings.items()
            if name in findings
        ]
        texts.append(f"{name}: {'; '.join(scores)}.")
    return " ".join(texts)


def _curves_alt_text(run: RunData) -> str:
    """Return how many items each suite was measured on, at most."""
    most = {
        name: max(curve[-1][0] for curve in models.values())
        for name, models in run.suites.curves.items()
    }
    return ", ".join(f"{name} on up to {items} items" for name, items in most.items()) + "."
