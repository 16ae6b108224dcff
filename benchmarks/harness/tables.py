"""Markdown tables made from figures, and the places on pages that they are written to.

A place is what stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of a page is
written by hand. Knows no claim: each makes its own tables with the functions here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.record import RESULTS

PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = ["Not measured yet."]
GB = 1e9

TableRow = Sequence[object]


def render(page: str, claims: Sequence[Claim], results: Path = RESULTS) -> str:
    """Return the page with its tables made anew from the files in `results`.

    Raises:
        KeyError: A place of the page has a name that no claim has a table for.
    """
    owners = {name: claim for claim in claims for name in claim.tables}

    def block(match: re.Match[str]) -> str:
        claim = owners[match["name"]]
        lines = _with_origin(claim, match["name"], results / f"{claim.results}.json")
        return "\n".join([match[1].rstrip(), *lines, match[3]])

    return PLACE.sub(block, page)


def _with_origin(claim: Claim, name: str, file: Path) -> list[str]:
    if not file.exists():
        return NOT_MEASURED
    record = json.loads(file.read_text(encoding="utf-8"))
    lines = claim.tables[name](record["figures"])
    return [*lines, "", origin(record)] if lines else NOT_MEASURED


def origin(record: Mapping[str, Any]) -> str:
    """Return a line that says what produced a record: command, date, machine, versions."""
    machine, versions = record["machine"], record["versions"]
    units = machine.get("matrix_units")
    cpu = machine["cpu"] + (f" with {', '.join(units)}" if units else "")
    return (
        f"`{record['command']}`, {record['date']}, {machine['cores']} cores, {cpu}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def table(head: TableRow, rows: Sequence[TableRow]) -> list[str]:
    """Return the lines of a Markdown table; none without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def column_table(columns: Mapping[str, Callable[[Any], object]], rows: Sequence[Any]) -> list[str]:
    """Return a table with a line per row.

    Args:
        columns: By heading, the function that returns a row's cell.
        rows: What is measured, one for each line.
    """
    return table(tuple(columns), [[cell(row) for cell in columns.values()] for row in rows])


def cross_table(
    corner: str,
    lines: Mapping[str, Any],
    columns: Mapping[str, Any],
    cell: Callable[[Any, Any], object],
) -> list[str]:
    """Return a table whose cells depend on a line's key and a column's key.

    Args:
        corner: Heading of the first column, which has the titles of the lines.
        lines: Keys of the lines by title.
        columns: Keys of the columns by heading.
        cell: Returns the cell of a line's and a column's key.
    """
    body = [
        (title, *(cell(row, column) for column in columns.values())) for title, row in lines.items()
    ]
    return table((corner, *columns), body)


def median_and_range(values: Mapping[str, float], digits: int = 2) -> str:
    """Return the text `median (min to max)` of a spread."""
    low, middle, high = (f"{values[name]:.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def gigabytes(count: float, digits: int = 2) -> str:
    """Return bytes as a number of gigabytes."""
    return f"{count / GB:.{digits}f}"


def places(pages: Sequence[Path]) -> dict[str, Path]:
    """Return the page that each table stands on, by the table's name."""
    return {
        match["name"]: page
        for page in pages
        for match in PLACE.finditer(page.read_text(encoding="utf-8"))
    }


def as_saved(figures: Figures) -> Figures:
    """Return figures as they are read back from their file: keys are texts, tuples are lists."""
    loaded: Figures = json.loads(json.dumps(figures))
    return loaded
