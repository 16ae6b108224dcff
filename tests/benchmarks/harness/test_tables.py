"""Markdown tables, and their places on pages."""

import json

import pytest

from benchmarks.harness.claim import Claim
from benchmarks.harness.tables import (
    column_table,
    cross_table,
    median_and_range,
    places,
    render,
    table,
)

RECORD = {
    "command": "python -m benchmarks.made_up --size 3",
    "date": "2026-01-02",
    "machine": {"cpu": "A CPU", "cores": 2, "matrix_units": ["amx_bf16"]},
    "versions": {"torch": "2.0", "transformers": "5.0"},
    "figures": {"rows": [{"size": 3, "seconds": 1.25}]},
}
CLAIM = Claim(
    "made_up",
    "How long it takes.",
    "made_up",
    {
        "times": lambda figures: column_table(
            {"size": lambda row: row["size"], "s": lambda row: f"{row['seconds']:.1f}"},
            figures["rows"],
        ),
        "nothing": lambda figures: [],
    },
)
PAGE = "a\n<!-- table: times -->\nold\n<!-- end -->\nb\n"


def test_a_table_without_rows_is_none():
    assert table(("head",), []) == []


def test_a_cross_table_asks_for_each_line_and_column():
    lines = cross_table("x", {"two": 2, "three": 3}, {"× 5": 5, "× 7": 7}, lambda a, b: a * b)
    assert lines == [
        "| x | × 5 | × 7 |",
        "| --- | --- | --- |",
        "| two | 10 | 14 |",
        "| three | 15 | 21 |",
    ]


def test_a_spread_reads_as_median_and_range():
    assert median_and_range({"min": 1.0, "median": 2.0, "max": 3.5}, 1) == "2.0 (1.0 to 3.5)"


def test_a_table_on_a_page_says_what_produced_it(tmp_path):
    (tmp_path / "made_up.json").write_text(json.dumps(RECORD))
    assert render(PAGE, [CLAIM], tmp_path).splitlines()[1:-1] == [
        "<!-- table: times -->",
        "| size | s |",
        "| --- | --- |",
        "| 3 | 1.2 |",
        "",
        "`python -m benchmarks.made_up --size 3`, 2026-01-02, 2 cores, A CPU with amx_bf16, "
        "torch 2.0, transformers 5.0.",
        "<!-- end -->",
    ]


def test_a_table_without_results_says_so(tmp_path):
    new = render(PAGE, [CLAIM], tmp_path)
    assert new == "a\n<!-- table: times -->\nNot measured yet.\n<!-- end -->\nb\n"


def test_a_table_of_results_that_do_not_have_it_says_so(tmp_path):
    (tmp_path / "made_up.json").write_text(json.dumps(RECORD))
    page = "<!-- table: nothing -->\n<!-- end -->\n"
    assert render(page, [CLAIM], tmp_path).splitlines()[1] == "Not measured yet."


def test_a_place_that_no_claim_has_a_table_for_is_refused(tmp_path):
    with pytest.raises(KeyError, match="unknown"):
        render("<!-- table: unknown -->\n<!-- end -->", [CLAIM], tmp_path)


def test_places_are_found_by_the_name_of_their_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert places([page]) == {"times": page}
