"""Render one self-contained page of HTML: sections of text, tables, and figures with a slider.

Knows nothing about what they show. A colour written `var(--name)` in a figure is taken from the
page's stylesheet, which knows light and dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_abliterate.report.figures.plotly_parts import Figure


@dataclass(frozen=True)
class PageTable:
    """A table of texts whose first column is a heading."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure of one or several views, each with plotly's `data` and `layout`.

    Attributes:
        title: Its heading.
        note: What it shows.
        views: See `plotly_parts.view`.
        chosen: Index of the view that is shown first.
        stepped: Whether it follows the section's slider; it then has a view for each step.
    """

    title: str
    note: str
    views: Sequence[Figure]
    chosen: int = 0
    stepped: bool = False


@dataclass(frozen=True)
class PageSection:
    """A heading with paragraphs, tables and plots below it, in this order.

    Attributes:
        title: The heading.
        text: Paragraphs.
        tables: Shown after the text.
        plots: Shown after the tables.
        steps: Labels of a slider that all stepped plots follow; no slider if empty.
        start: The step that is shown first.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    plots: Sequence[Plot] = ()
    steps: Sequence[str] = ()
    start: int = 0


@dataclass(frozen=True)
class Page:
    """A page with its title, a leading paragraph, and sections."""

    title: str
    lead: str
    sections: Sequence[PageSection] = field(default_factory=tuple)

    def html(self) -> str:
        """Render the page; it loads nothing from the network."""
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
            page=self,
            figures=figures,
            numbers=_number_plots(self.sections),
            plotly=Markup(get_plotlyjs()),
        )


def _number_plots(sections: Sequence[PageSection]) -> list[list[int]]:
    """Return the index of each section's plots among all plots of the page."""
    numbers, first = [], 0
    for section in sections:
        numbers.append(list(range(first, first + len(section.plots))))
        first += len(section.plots)
    return numbers
