"""Draw the frontier: every trial by its objectives, with its scores and plan on hovering."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ray_abliterate.report.figures.plotly_parts import Axis, Figure, figure, line, marks, view
from ray_abliterate.report.run_data import RunData, hover_text, title_text
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.score_text import number_text

STOPPED = "stopped early (bound)"
"""Name in the legend of trials whose scores are bounds."""


def frontier_figure(run: RunData) -> Figure:
    """Return a figure of each pair of objectives, or of a single objective over the trials."""
    names = [score.name for score in run.objectives]
    if len(names) == 1:
        note = "Each point is a finished trial; the line is the best so far."
        return figure("Score of every trial", note, [_single_view(run, names[0])], _alt_text(run))
    note = (
        "Each point is a finished trial, the stronger its colour the later. Trials of the "
        "frontier have their 95\u00a0% intervals."
    )
    views = [_pair_view(run, x, y, joined=len(names) == 2) for y, x in combinations(names, 2)]
    return figure("Frontier", note, views, _alt_text(run))


def _alt_text(run: RunData) -> str:
    """Return the figure in words, for screen readers."""
    if not run.best:
        return ""

    def place(card: Scorecard) -> str:
        return ", ".join(f"{s.name} {number_text(s.value)}" for s in card.objectives)

    members = zip(run.frontier.members, run.best, strict=True)
    texts = [f"trial {trial.number}: {place(card)}" for trial, card in members]
    base = f" The base model: {place(run.baseline)}." if run.baseline else ""
    return f"{len(run.finished)} trials. On the frontier {'; '.join(texts)}.{base}"


def _points(run: RunData, x: Sequence[Any], y: Sequence[Any]) -> Figure:
    """Return all finished trials as points, coloured by their order."""
    numbers = [trial.number for trial, _ in run.finished]
    scale = {"color": numbers, "colorscale": [[0, "var(--early)"], [1, "var(--late)"]]}
    bar = {
        "title": {"text": "trial", "font": {"size": 13}},
        "thickness": 8,
        "outlinewidth": 0,
        "len": 0.6,
    }
    mark = {"size": 9, "showscale": True, "colorbar": bar, **scale}
    return _trials(run, "trials", run.finished, x, y, mark)


def _trials(
    run: RunData,
    name: str,
    trials: Sequence[tuple[Trial, Scorecard]],
    x: Sequence[Any],
    y: Sequence[Any],
    mark: Figure,
) -> Figure:
    """Return trials as points with hover texts, which a click takes into the comparison."""
    hover = [
        hover_text(
            f"trial {trial.number}" + (", stopped early" if trial.pruned else ""),
            card,
            trial.plan,
            run.validation_texts(trial),
        )
        for trial, card in trials
    ]
    keys = [str(trial.number) for trial, _ in trials]
    return marks(name, x, y, hover, mark) | {"customdata": keys}


def _bounds(run: RunData, x: Sequence[Any], y: Sequence[Any]) -> list[Figure]:
    """Return trials that were stopped early as faint points: they lie here, or further out."""
    if not run.pruned:
        return []
    mark = {"size": 8, "symbol": "circle-open", "color": "var(--muted)", "opacity": 0.6}
    mark["line"] = {"color": "var(--muted)", "width": 1}
    return [_trials(run, STOPPED, run.pruned, x, y, mark)]


def _single_view(run: RunData, name: str) -> Figure:
    numbers = [trial.number for trial, _ in run.finished]
    values = [card[name].value for _, card in run.finished]
    better = max if run.objectives[0].goal == "maximize" else min
    best = [better(values[: stop + 1]) for stop in range(len(values))]
    data = [
        line("best so far", numbers, best, "knee")
        | {"line": {"color": "var(--knee)", "shape": "hv"}},
        _points(run, numbers, values),
        *_bounds(run, [t.number for t, _ in run.pruned], [c[name].value for _, c in run.pruned]),
    ]
    trial, score = run.frontier.members[0], run.best[0][name]
    mark = {"size": 10, "color": "var(--knee)"}
    top = _trials(run, "best", [(trial, run.best[0])], [trial.number], [score.value], mark)
    data.append(top | Axis([score], log=False).error_bars([score], "y"))
    if run.baseline:
        base = [run.baseline[name].value] * 2
        data.append(line("base model", [numbers[0], numbers[-1]], base, "base"))
    return view(name, data, "trial number", title_text(run.objectives[0]))


def _pair_view(run: RunData, x_name: str, y_name: str, joined: bool) -> Figure:
    cards = [card for _, card in run.finished]
    pruned = [card for _, card in run.pruned]
    all_cards = [*cards, *pruned, *([run.baseline] if run.baseline else [])]
    x_axis = Axis([card[x_name] for card in all_cards], log=True)
    y_axis = Axis([card[y_name] for card in all_cards], log=False)

    def x(cards: list[Scorecard]) -> list[float]:
        return [x_axis.place(card[x_name].value) for card in cards]

    def y(cards: list[Scorecard]) -> list[float]:
        return [card[y_name].value for card in cards]

    members, best, knee = run.frontier.members, run.best, run.frontier.knee
    pairs = list(zip(members, best, strict=True))
    edge = _trials(run, "frontier", pairs, x(best), y(best), {"size": 10, "color": "var(--knee)"})
    edge |= x_axis.error_bars([c[x_name] for c in best], "x")
    edge |= y_axis.error_bars([c[y_name] for c in best], "y")
    joint = {"mode": "lines+markers", "line": {"color": "var(--knee)", "width": 1.5}}
    edge |= joint if joined else {}
    data = [*_bounds(run, x(pruned), y(pruned)), _points(run, x(cards), y(cards)), edge]
    star = {"size": 17, "color": "var(--knee)", "symbol": "star"}
    top = [pairs[members.index(knee)]]
    data.append(_trials(run, "knee", top, x([top[0][1]]), y([top[0][1]]), star))
    if run.baseline:
        mark = {"size": 13, "color": "var(--base)", "symbol": "diamond"}
        base = [run.baseline]
        hover = [hover_text("base model", base[0], more=run.validation_texts(None))]
        point = marks("base model", x(base), y(base), hover, mark)
        data.append(point | {"customdata": ["base"]})
    titles = title_text(cards[0][x_name]), title_text(cards[0][y_name])
    axes = x_axis.layout(titles[0]), y_axis.layout(titles[1])
    return view(f"{y_name} against {x_name}", data, *axes)
