"""One self-contained page of HTML: sections of text, tables, and figures with a slider.

Knows nothing about what they show. A colour written `var(--name)` in a figure is taken from the
page's stylesheet, which knows light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Figure = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column is a heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure of one or several views, as plotly's `data` and `layout`.

    Attributes:
        title: Above it.
        note: What it shows.
        views: Each a dictionary of `label`, `data` and `layout`.
        chosen: The view that is shown first.
        stepped: It follows the section's slider, and has a view for each of its steps.
    """

    title: str
    note: str
    views: Sequence[Figure]
    chosen: int = 0
    stepped: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what is below it.

    Attributes:
        title: The heading.
        text: Paragraphs.
        tables: Below them.
        plots: Below these.
        steps: Labels of a slider that all stepped plots follow; none without.
        start: Where it stands first.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    steps: Sequence[str] = ()
    start: int = 0


@dataclass(frozen=True)
class Page:
    """What is shown."""

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)

    def html(self) -> str:
        """The page, which loads nothing from anywhere."""
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs

        pages = Environment(
            loader=PackageLoader("ray_abliterate.report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        plots = [plot for section in self.sections for plot in section.plots]
        figures = [
            {"views": plot.views, "chosen": plot.chosen, "stepped": plot.stepped} for plot in plots
        ]
        return pages.get_template("page.html.jinja").render(
            page=self, figures=figures, numbers=_numbered(self.sections),
            plotly=Markup(get_plotlyjs()),
        )  # fmt: skip


def view(label: str, data: Sequence[Figure], x: Any, y: Any, **layout: Any) -> Figure:
    """One state of a plot; `x` and `y` are axis titles, or whole axes."""
    axes = [{"title": {"text": axis}} if isinstance(axis, str) else axis for axis in (x, y)]
    return {"label": label, "data": data, "layout": {"xaxis": axes[0], "yaxis": axes[1], **layout}}


def line(name: str, x: Sequence[Any], y: Sequence[Any], number: int, **more: Any) -> Figure:
    """A line in one of six colours, dashed from the seventh on, dotted from the thirteenth."""
    dash = ("solid", "dash", "dot", "dashdot")[number // 6 % 4]
    style = {"color": f"var(--c{number % 6})", "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style} | more


def upright(layer: float, text: str) -> dict[str, Any]:
    """A dashed line with a text at a layer, as parts of a layout."""
    style = {"color": "var(--muted)", "width": 1, "dash": "dash"}
    shape = {"type": "line", "x0": layer, "x1": layer, "yref": "paper", "y0": 0, "y1": 1}
    note = {"x": layer, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text}
    return {"shapes": [shape | {"line": style}], "annotations": [note | {"showarrow": False}]}


def short(values: Any) -> list[float | None]:
    """Numbers in four digits, which is all that a figure shows; None where there is none."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
        for value in values
    ]


def _numbered(sections: Sequence[Section]) -> list[list[int]]:
    """The place of each section's plots among all."""
    found, first = [], 0
    for section in sections:
        found.append(list(range(first, first + len(section.plots))))
        first += len(section.plots)
    return found
