"""Build the parts of plotly figures: views, lines, points, axes, and the figure itself.

A figure is a title, a note, a text for readers who cannot see it, and one or more views, of which
the page shows one at a time. Everything is a plain dictionary, so that plotly need not be imported.
A colour written `var(--name)` is taken from the page's stylesheet, which knows light and dark.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ray_abliterate.search.score import Score
from ray_abliterate.search.score_text import number_text

Figure = dict[str, Any]
"""A plotly figure, or a part of one, in the form that plotly.js reads."""
LOG_SPAN = 30.0
"""An axis is logarithmic if its largest value is this many times the smallest above 0."""
COLORS = 6
"""Colours in the stylesheet, `--c0` to `--c5`."""
DASHES = ("solid", "dash", "dot", "dashdot")


def figure(title: str, note: str, views: list[Figure], alt: str = "", chosen: int = 0) -> Figure:
    """Return a figure of the report; the page leaves out one without views.

    Args:
        title: Heading of the figure.
        note: What it shows, below the heading.
        views: Its states; see `view`.
        alt: What it shows in a sentence, for screen readers.
        chosen: Index of the view that is shown first.
    """
    return {"title": title, "note": note, "views": views, "alt": alt, "chosen": chosen}


def view(label: str, data: Sequence[Figure], x: Any, y: Any, **layout: Any) -> Figure:
    """Return one state of a figure.

    Args:
        label: Its name in the figure's menu.
        data: Traces.
        x: Title of the horizontal axis, or plotly's whole axis.
        y: The same for the vertical axis.
        layout: Further entries of plotly's `layout`.
    """
    axes = [{"title": {"text": axis}} if isinstance(axis, str) else axis for axis in (x, y)]
    return {"label": label, "data": data, "layout": {"xaxis": axes[0], "yaxis": axes[1], **layout}}


def line(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **trace: Any) -> Figure:
    """Return a line in a colour of the stylesheet, such as `c0` or `knee`."""
    style = {"color": f"var(--{color})", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style} | trace


def numbered_line(
    name: str, x: Sequence[Any], y: Sequence[Any], number: int, **trace: Any
) -> Figure:
    """Return a line in one of six colours, dashed from the seventh on, dotted from the 13th on."""
    drawn = line(name, x, y, f"c{number % COLORS}", **trace)
    drawn["line"]["dash"] = DASHES[number // COLORS % len(DASHES)]
    return drawn


def marks(name: str, x: Sequence[Any], y: Sequence[Any], hover: list[str], mark: Figure) -> Figure:
    """Return points in the style `mark`, each with the text that is shown on hovering."""
    outline = {"color": "var(--paper)", "width": 1}
    points = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y}
    return points | {"marker": {"line": outline, **mark}, "text": hover, "hoverinfo": "text"}


def vertical_rule(layer: float, text: str) -> Figure:
    """Return the `shapes` and `annotations` of a layout for a labelled dashed line at `layer`."""
    dashed = {"color": "var(--muted)", "width": 1, "dash": "dash"}
    shape = {"type": "line", "x0": layer, "x1": layer, "yref": "paper", "y0": 0, "y1": 1}
    note = {"x": layer, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text}
    return {"shapes": [shape | {"line": dashed}], "annotations": [note | {"showarrow": False}]}


def four_digits(values: Iterable[Any]) -> list[float | None]:
    """Round numbers to four significant digits, all that a figure shows; None stays a gap.

    What is not finite becomes a gap too, since JSON has no word for it.
    """
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
        for value in values
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between two values above 0; if there are fewer than three, also 2
    and 5 times them.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return tens if len(tens) >= 3 else [tick for tick in fine if low <= tick <= high]


class Axis:
    """Represents the axis of one score, with room for zero where it is logarithmic."""

    def __init__(self, scores: Iterable[Score], log: bool) -> None:
        """Choose the scale from the range of the values.

        Args:
            scores: All scores that are drawn, at least one.
            log: Whether the axis may be logarithmic.
        """
        values = [score.value for score in scores]
        positive = [value for value in values if value > 0]
        self.log = log and min(values) >= 0 and len(positive) > 1
        self.log = self.log and max(positive) / min(positive) >= LOG_SPAN
        self.edge, self.top = (min(positive) / 3, max(positive)) if self.log else (-math.inf, 0.0)
        self.zero = 0.0 in values

    def place(self, value: float) -> float:
        """Return where a value is drawn: on a logarithmic axis, 0 lies at the left edge."""
        return max(value, self.edge)

    def error_bars(self, scores: Sequence[Score], axis: str, color: str = "interval") -> Figure:
        """Return the intervals of scores as the `error_x` or `error_y` of a trace."""
        up = [s.high - s.value for s in scores]
        down = [self.place(s.value) - self.place(s.low) for s in scores]
        bars = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 3}
        return {f"error_{axis}": {"type": "data", "color": f"var(--{color})", **bars}}

    def layout(self, title: str) -> Figure:
        """Return plotly's `xaxis` or `yaxis`, with ticks and range where it is logarithmic."""
        if not self.log:
            return {"title": {"text": title}}
        ticks = [*([self.edge] if self.zero else []), *log_ticks(2 * self.edge, self.top)]
        texts = ["0" if tick == self.edge else number_text(tick) for tick in ticks]
        span = [math.log10(self.edge) - 0.15, math.log10(self.top) + 0.15]
        kind = "log scale; 0 at the left edge" if self.zero else "log scale"
        ticked = {"tickvals": ticks, "ticktext": texts, "range": span, "type": "log"}
        return {"title": {"text": f"{title}<br>{kind}"}, **ticked}
