"""The figures of the report, as plain plotly dictionaries.

A colour written `var(--name)` is taken from the page's stylesheet, which knows light and dark.
"""

import html
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from ray_abliterate.frontier import Frontier
from ray_abliterate.plan import Choice, Range, Value
from ray_abliterate.report_data import Figure, RunData, hover_text, number_text, title_text
from ray_abliterate.rundir import Baseline
from ray_abliterate.scoring import Score, Scorecard

ENOUGH_TRIALS = 8
"""Finished trials below which parameter importances would be noise."""
LOG_SPAN = 30.0
"""An axis is logarithmic if its largest value is this many times the smallest above 0."""
STOPPED = "stopped early (bound)"
"""What the legend calls trials whose scores are bounds."""


def _figure(title: str, note: str, views: list[Figure], chosen: int = 0) -> Figure:
    return {"title": title, "note": note, "views": views, "chosen": chosen}


def _view(label: str, data: list[Figure], x: Any, y: Any, **layout: Any) -> Figure:
    """One state of a figure; `x` and `y` are axis titles, or whole axes."""
    axes = [{"title": {"text": a}} if isinstance(a, str) else a for a in (x, y)]
    return {"label": label, "data": data, "layout": {"xaxis": axes[0], "yaxis": axes[1], **layout}}


def _line(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **more: Any) -> Figure:
    style = {"color": f"var(--{color})", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style} | more


def _vertical(layer: float, text: str) -> Figure:
    """A dashed line with a text at a layer, as parts of a layout."""
    line = {"color": "var(--muted)", "width": 1, "dash": "dash"}
    shape = {"type": "line", "x0": layer, "x1": layer, "yref": "paper", "y0": 0, "y1": 1}
    note = {"x": layer, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text}
    return {"shapes": [shape | {"line": line}], "annotations": [note | {"showarrow": False}]}


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two values above 0; with fewer than three, also 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return tens if len(tens) >= 3 else [tick for tick in fine if low <= tick <= high]


class _Axis:
    """Where the values of one score are drawn, with room for zero if the axis is logarithmic."""

    def __init__(self, scores: Iterable[Score], log: bool) -> None:
        values = [score.value for score in scores]
        above = [value for value in values if value > 0]
        self.log = log and min(values) >= 0 and len(above) > 1
        self.log = self.log and max(above) / min(above) >= LOG_SPAN
        self.edge, self.top = (min(above) / 3, max(above)) if self.log else (-math.inf, 0.0)
        self.zero = 0.0 in values

    def place(self, value: float) -> float:
        return max(value, self.edge)

    def error(self, scores: Sequence[Score], axis: str) -> Figure:
        """Intervals as error bars."""
        up = [s.high - s.value for s in scores]
        down = [self.place(s.value) - self.place(s.low) for s in scores]
        bars = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 3}
        return {f"error_{axis}": {"type": "data", "color": "var(--knee)", **bars}}

    def layout(self, title: str) -> Figure:
        if not self.log:
            return {"title": {"text": title}}
        ticks = [*([self.edge] if self.zero else []), *_log_ticks(2 * self.edge, self.top)]
        texts = ["0" if tick == self.edge else number_text(tick) for tick in ticks]
        span = [math.log10(self.edge) - 0.15, math.log10(self.top) + 0.15]
        kind = "log scale; 0 at the left edge" if self.zero else "log scale"
        ticked = {"tickvals": ticks, "ticktext": texts, "range": span, "type": "log"}
        return {"title": {"text": f"{title}<br>{kind}"}, **ticked}


def _marks(name: str, x: Sequence[Any], y: Sequence[Any], hover: list[str], mark: Figure) -> Figure:
    outline = {"color": "var(--paper)", "width": 1}
    points = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y}
    return points | {"marker": {"line": outline, **mark}, "text": hover, "hoverinfo": "text"}


def _points(run: RunData, x: Sequence[Any], y: Sequence[Any]) -> Figure:
    """All finished trials, coloured by their order."""
    numbers = [trial.number for trial, _ in run.finished]
    hover = [hover_text(f"trial {trial.number}", card, trial.plan) for trial, card in run.finished]
    scale = {"color": numbers, "colorscale": [[0, "var(--early)"], [1, "var(--late)"]]}
    bar = {
        "title": {"text": "trial", "font": {"size": 13}},
        "thickness": 8,
        "outlinewidth": 0,
        "len": 0.6,
    }
    return _marks("trials", x, y, hover, {"size": 9, "showscale": True, "colorbar": bar, **scale})


def _bounds(run: RunData, x: Sequence[Any], y: Sequence[Any]) -> list[Figure]:
    """Trials that were stopped early, apart and faint: they lie here, or further out."""
    if not run.bounded:
        return []
    hover = [
        hover_text(f"trial {t.number}, stopped early", card, t.plan) for t, card in run.bounded
    ]
    mark = {"size": 8, "symbol": "circle-open", "color": "var(--muted)", "opacity": 0.6}
    mark["line"] = {"color": "var(--muted)", "width": 1}
    return [_marks(STOPPED, x, y, hover, mark)]


def frontier_figure(run: RunData) -> Figure:
    """The frontier: first objective against the second, or every pair."""
    names = [score.name for score in run.objectives]
    if len(names) == 1:
        note = "Every point is a finished trial; the line is the best so far."
        return _figure("Score of every trial", note, [_single_view(run, names[0])])
    note = (
        "Every point is a finished trial, the stronger its colour the later. Members of the "
        "frontier carry their 95\u00a0% intervals. Hover or tap a point for its scores and plan."
    )
    views = [_pair_view(run, x, y, joined=len(names) == 2) for y, x in combinations(names, 2)]
    return _figure("Frontier", note, views)


def _single_view(run: RunData, name: str) -> Figure:
    numbers = [trial.number for trial, _ in run.finished]
    values = [card[name].value for _, card in run.finished]
    better = max if run.objectives[0].goal == "maximize" else min
    best = [better(values[: stop + 1]) for stop in range(len(values))]
    data = [
        _line("best so far", numbers, best, "knee")
        | {"line": {"color": "var(--knee)", "shape": "hv"}},
        _points(run, numbers, values),
        *_bounds(run, [t.number for t, _ in run.bounded], [c[name].value for _, c in run.bounded]),
    ]
    trial, score = run.frontier.members[0], run.best[0][name]
    mark = {"size": 10, "color": "var(--knee)"}
    hover = [hover_text(f"trial {trial.number}", run.best[0], trial.plan)]
    top = _marks("best", [trial.number], [score.value], hover, mark)
    data.append(top | _Axis([score], log=False).error([score], "y"))
    if run.baseline:
        base = [run.baseline[name].value] * 2
        data.append(_line("base model", [numbers[0], numbers[-1]], base, "base"))
    return _view(name, data, "trial number", title_text(run.objectives[0]))


def _pair_view(run: RunData, x_name: str, y_name: str, joined: bool) -> Figure:
    cards = [card for _, card in run.finished]
    bounded = [card for _, card in run.bounded]
    every = [*cards, *bounded, *([run.baseline] if run.baseline else [])]
    x_axis = _Axis([card[x_name] for card in every], log=True)
    y_axis = _Axis([card[y_name] for card in every], log=False)

    def x(cards: list[Scorecard]) -> list[float]:
        return [x_axis.place(card[x_name].value) for card in cards]

    def y(cards: list[Scorecard]) -> list[float]:
        return [card[y_name].value for card in cards]

    members, best, knee = run.frontier.members, run.best, run.frontier.knee
    hover = [hover_text(f"trial {t.number}", c, t.plan) for t, c in zip(members, best, strict=True)]
    edge = _marks("frontier", x(best), y(best), hover, {"size": 10, "color": "var(--knee)"})
    edge |= x_axis.error([c[x_name] for c in best], "x") | y_axis.error(
        [c[y_name] for c in best], "y"
    )
    edge |= (
        {"mode": "lines+markers", "line": {"color": "var(--knee)", "width": 1.5}} if joined else {}
    )
    data = [*_bounds(run, x(bounded), y(bounded)), _points(run, x(cards), y(cards)), edge]
    star = {"size": 17, "color": "var(--knee)", "symbol": "star"}
    at = members.index(knee)
    data.append(_marks("knee", x(best[at : at + 1]), y(best[at : at + 1]), [hover[at]], star))
    if run.baseline:
        mark = {"size": 13, "color": "var(--base)", "symbol": "diamond"}
        base = [run.baseline]
        data.append(
            _marks("base model", x(base), y(base), [hover_text("base model", base[0])], mark)
        )
    titles = title_text(cards[0][x_name]), title_text(cards[0][y_name])
    axes = x_axis.layout(titles[0]), y_axis.layout(titles[1])
    return _view(f"{y_name} against {x_name}", data, *axes)


def strength_figure(run: RunData) -> Figure:
    """Strength over layers, for each member of the frontier."""
    layers = run.space.shape.layers if run.space else len(run.base.separation) if run.base else 0
    views, chosen, top = [], 0, 0.0
    for trial in run.frontier.members if layers else ():
        plan, data = trial.plan, []
        for index, (name, _) in enumerate(plan.profiles):
            strengths = plan.strengths(name, layers)
            top = max(top, *strengths)
            data.append(_line(name, list(range(layers)), strengths, f"c{index % 6}"))
        mark = _vertical(plan.direction_layer, f"direction {plan.direction_layer:.1f}")
        label = f"trial {trial.number}" + (" (knee)" if trial is run.frontier.knee else "")
        y = {"title": {"text": "strength (1 removes the direction)"}, "rangemode": "tozero"}
        more = mark if plan.scope == "global" else {}
        views.append(_view(f"{label}, {plan.scope} direction", data, "layer", y, **more))
        chosen = len(views) - 1 if trial is run.frontier.knee else chosen
    for view in views:
        view["layout"]["yaxis"] |= {"range": [0, 1.05 * top or 1]}
    note = "How strongly each component is edited, layer by layer, in one member of the frontier."
    return _figure("Strength over layers", note, views, chosen)


SEPARATION = (
    ("auroc", "Telling the sets apart", "AUROC (0.5: by chance)", ("auroc",)),
    ("fisher", "Distance between the sets", "Fisher ratio", ("fisher",)),
    ("cosine", "Angle between the two means", "cosine", ("cosine",)),
    ("norms", "Lengths", "norm (log scale)", ("behaviour_norm", "neutral_norm", "direction_norm")),
)


def separation_figures(base: Baseline | None) -> dict[str, Figure]:
    """How well each layer tells the prompt sets apart."""
    figures = {}
    for key, title, unit, columns in SEPARATION:
        views = []
        if base and base.separation:
            layers = [row["layer"] for row in base.separation]
            data = []
            for index, column in enumerate(columns):
                values = [row.get(column, math.nan) for row in base.separation]
                known = [value if math.isfinite(value) else None for value in values]
                data.append(_line(column.replace("_", " "), layers, known, f"c{index}"))
            above = [v for line in data for v in line["y"] if v is not None and v > 0]
            y: Figure = {"title": {"text": unit}}
            if key == "norms" and above:
                ticks = _log_ticks(min(above), max(above))
                y |= {"type": "log", "tickvals": ticks, "ticktext": [*map(number_text, ticks)]}
            mark = _vertical(base.best_layer, f"best layer {base.best_layer}")
            views = [_view(title, data, "layer", y, **mark)]
        figures[key] = _figure(title, "", views)
    return figures


def progress_figures(run: RunData) -> dict[str, Figure]:
    """How the search went: hypervolume of the frontier so far, and seconds of each trial."""
    runs: list[Figure] = []
    for name, trials, color in (
        ("finished", [trial for trial, _ in run.finished], "c0"),
        ("stopped early", [trial for trial, _ in run.bounded], "muted"),
        ("failed", run.failed, "c1"),
    ):
        hover = [f"trial {trial.number}: {trial.seconds:.1f} s" for trial in trials]
        mark = {"size": 8, "color": f"var(--{color})", "symbol": "x" if color == "c1" else "circle"}
        x = [trial.number for trial in trials]
        runs += [_marks(name, x, [t.seconds for t in trials], hover, mark)] if trials else []
    y = {"title": {"text": "seconds"}, "rangemode": "tozero"}
    seconds = [_view("seconds", runs, "trial number", y)] if runs else []
    note, views = _hypervolume_views(run)
    return {
        "hypervolume": _figure("Hypervolume of the frontier so far", note, views),
        "seconds": _figure("Seconds of every trial", "", seconds),
    }


def _hypervolume_views(run: RunData) -> tuple[str, list[Figure]]:
    if not run.best or len(run.objectives) > 3:
        return "", []
    columns = list(zip(*(card.losses for card in run.best), strict=True))
    ideal = [min(column) for column in columns]
    base = run.baseline.losses if run.baseline else tuple(ideal)
    worst = [max(*column, b) for column, b in zip(columns, base, strict=True)]
    reference = [w + 0.1 * (w - i or 1.0) for w, i in zip(worst, ideal, strict=True)]
    box = math.prod(r - i for r, i in zip(reference, ideal, strict=True))
    frontier, shares = Frontier(()), []
    for trial, _ in run.finished:
        frontier = Frontier.of((*frontier.members, trial))
        shares.append(frontier.hypervolume(reference) / box)
    signs = [-1 if score.goal == "maximize" else 1 for score in run.objectives]
    point = ", ".join(
        f"{score.name} {number_text(sign * r)}"
        for score, sign, r in zip(run.objectives, signs, reference, strict=True)
    )
    note = (
        f"Share of the box between the reference point ({point}: a tenth beyond the worst of the "
        "frontier and the base model) and the best value of each objective."
    )
    numbers = [trial.number for trial, _ in run.finished]
    line = _line("share", numbers, shares, "c0")
    line["line"]["shape"] = "hv"
    y = {"title": {"text": "share of the box"}, "rangemode": "tozero"}
    return note, [_view("share", [line], "trial number", y)]


def importance_figure(run: RunData) -> tuple[Figure, str]:
    """Shares of the parameters in reaching the best trials, per objective; or why there are none.

    PED-ANOVA (Watanabe et al. 2023), because optuna's other evaluators need scikit-learn.
    """
    empty, done = _figure("Parameter importance", "", []), len(run.finished)
    if done < ENOUGH_TRIALS:
        return empty, f"{done} trials finished; importances need {ENOUGH_TRIALS}."
    shares = {
        score.name: _importances(run, [card.losses[index] for _, card in run.finished])
        for index, score in enumerate(run.objectives)
    }
    missing = [name for name, share in shares.items() if not share]
    note = f"Every trial has about the same {' and '.join(missing)}, so nothing explains it."
    known = {name: share for name, share in shares.items() if share}
    if not known:
        return empty, note
    totals = {p: sum(share[p] for share in known.values()) for p in next(iter(known.values()))}
    order = sorted(totals, key=lambda parameter: -totals[parameter])
    data = [
        {"type": "bar", "orientation": "h", "name": html.escape(name), "y": order}
        | {"x": [share[p] for p in order], "marker": {"color": f"var(--c{index % 6})"}}
        for index, (name, share) in enumerate(known.items())
    ]
    y = {"title": {"text": "parameter"}, "autorange": "reversed"}
    view = _view("importance", data, "share", y, height=120 + (14 + 12 * len(known)) * len(order))
    about = (
        "How much each parameter decides whether a trial is among the best of an objective "
        "(PED-ANOVA; the shares of an objective add up to 1). With few trials this is rough."
    )
    return _figure("Parameter importance", about, [view]), note if missing else ""


def _importances(run: RunData, values: list[float]) -> dict[str, float]:
    """Share of each parameter; empty if the trials do not differ enough to tell."""
    import optuna

    points = [trial.plan.to_params() for trial, _ in run.finished]
    bounds = dict(run.space.parameters) if run.space else {}
    names = [name for name in points[0] if all(name in point for point in points)]
    domains = {name: _domain([p[name] for p in points], bounds.get(name)) for name in names}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    for point, value in zip(points, values, strict=True):
        params = {name: point[name] for name in names}
        study.add_trial(optuna.create_trial(params=params, distributions=domains, value=value))
    quantile = min(0.9, max(0.1, 5 / len(values)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal trials: said in the report instead
        found = evaluator.evaluate(study)
    total = sum(found.values())
    return {name: share / total for name, share in found.items()} if total > 0 else {}


def _domain(values: list[Value], bounds: Range | Choice | None) -> Any:
    """The distribution of one parameter, wide enough for every value that was tried."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    texts = [value for value in values if isinstance(value, str)]
    if texts:
        options = bounds.options if isinstance(bounds, Choice) else ()
        return CategoricalDistribution(sorted({*texts, *options}))
    ends = [bounds.low, bounds.high] if isinstance(bounds, Range) else []
    reals = [float(value) for value in values] + ends
    return FloatDistribution(min(reals), max(reals))
