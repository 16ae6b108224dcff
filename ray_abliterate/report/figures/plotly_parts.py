"""What figures are made of: views, lines, points, axes.

A figure is a title, a note, a text for those who can't see it, and one or more views, of which the
page shows one at a time. A colour written `var(--name)` is taken from the page's stylesheet, which
knows light and dark.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ray_abliterate.report.run_data import Figure, number_text
from ray_abliterate.search.score import Score

LOG_SPAN = 30.0
"""An axis is logarithmic if its largest value is this many times the smallest above 0."""


def figure(title: str, note: str, views: list[Figure], alt: str = "", chosen: int = 0) -> Figure:
    """A figure; without views it is left out of the page.

    Args:
        title: Above it.
        note: Below the title.
        views: See `view`.
        alt: What it shows, in a sentence.
        chosen: The view that is shown first.
    """
    return {"title": title, "note": note, "views": views, "alt": alt, "chosen": chosen}


def view(label: str, data: list[Figure], x: Any, y: Any, **layout: Any) -> Figure:
    """One state of a figure; `x` and `y` are axis titles, or whole axes."""
    axes = [{"title": {"text": a}} if isinstance(a, str) else a for a in (x, y)]
    return {"label": label, "data": data, "layout": {"xaxis": axes[0], "yaxis": axes[1], **layout}}


def line(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **more: Any) -> Figure:
    """A line; `color` is a name in the stylesheet."""
    style = {"color": f"var(--{color})", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style} | more


def marks(name: str, x: Sequence[Any], y: Sequence[Any], hover: list[str], mark: Figure) -> Figure:
    """Points, each with what it says when pointed at."""
    outline = {"color": "var(--paper)", "width": 1}
    points = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y}
    return points | {"marker": {"line": outline, **mark}, "text": hover, "hoverinfo": "text"}


def vertical(layer: float, text: str) -> Figure:
    """A dashed line with a text at a layer, as parts of a layout."""
    dashed = {"color": "var(--muted)", "width": 1, "dash": "dash"}
    shape = {"type": "line", "x0": layer, "x1": layer, "yref": "paper", "y0": 0, "y1": 1}
    note = {"x": layer, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text}
    return {"shapes": [shape | {"line": dashed}], "annotations": [note | {"showarrow": False}]}


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two values above 0; with fewer than three, also 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return tens if len(tens) >= 3 else [tick for tick in fine if low <= tick <= high]


class Axis:
    """Where the values of one score are drawn, with room for zero if the axis is logarithmic."""

    def __init__(self, scores: Iterable[Score], log: bool) -> None:
        """See how far the values reach.

        Args:
            scores: All that are drawn, one at least.
            log: Whether the axis may be logarithmic.
        """
        values = [score.value for score in scores]
        above = [value for value in values if value > 0]
        self.log = log and min(values) >= 0 and len(above) > 1
        self.log = self.log and max(above) / min(above) >= LOG_SPAN
        self.edge, self.top = (min(above) / 3, max(above)) if self.log else (-math.inf, 0.0)
        self.zero = 0.0 in values

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        return max(value, self.edge)

    def error(self, scores: Sequence[Score], axis: str, color: str = "interval") -> Figure:
        """Intervals as error bars."""
        up = [s.high - s.value for s in scores]
        down = [self.place(s.value) - self.place(s.low) for s in scores]
        bars = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 3}
        return {f"error_{axis}": {"type": "data", "color": f"var(--{color})", **bars}}

    def layout(self, title: str) -> Figure:
        """The axis."""
        if not self.log:
            return {"title": {"text": title}}
        ticks = [*([self.edge] if self.zero else []), *log_ticks(2 * self.edge, self.top)]
        texts = ["0" if tick == self.edge else number_text(tick) for tick in ticks]
        span = [math.log10(self.edge) - 0.15, math.log10(self.top) + 0.15]
        kind = "log scale; 0 at the left edge" if self.zero else "log scale"
        ticked = {"tickvals": ticks, "ticktext": texts, "range": span, "type": "log"}
        return {"title": {"text": f"{title}<br>{kind}"}, **ticked}
