"""Hypervolumes of searches: their arithmetic, and the file of finished searches."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.direction_search.hypervolumes import (
    SearchJob,
    SearchOutcome,
    append,
    by_budget,
    by_method,
    read,
)
from benchmarks.harness.statistics import spread

REFERENCES = {"clean": (1.0, 0.5)}


def outcome(method: str, seed: int, *losses: Any, seed_points: bool = True) -> SearchOutcome:
    """Return the outcome of a search with these rates and divergences."""
    return SearchOutcome(
        SearchJob("clean", method, seed, len(losses), seed_points, "k"), losses, 3, 0.9, 1.0
    )


def test_a_volume_is_the_share_of_the_rectangle_that_plans_cover() -> None:
    searched = outcome("whitened", 0, (0.5, 0.1), (0.0, 0.4), (0.6, 0.2), (0.0, 0.6), (1.0, 0.0))
    # 0.5 x 0.4 left of the first, 0.5 x 0.1 below it: the rest is dominated or beyond the reference
    assert searched.volume((1.0, 0.5)) == pytest.approx(100 * (0.5 * 0.4 + 0.5 * 0.1) / 0.5)


def test_a_volume_is_of_the_first_plans_and_failed_ones_are_none() -> None:
    searched = outcome("whitened", 0, (0.5, 0.25), None, (0.0, 0.0))
    assert searched.volume((1.0, 0.5), 2) == pytest.approx(25.0)
    assert searched.volume((1.0, 0.5)) == pytest.approx(100.0)
    assert outcome("whitened", 0, None).volume((1.0, 0.5)) == 0.0


def test_methods_are_summarized_over_seeds() -> None:
    rows = by_method(
        [
            outcome("mean-difference", 0, (0.5, 0.25)),
            outcome("mean-difference", 1, (0.0, 0.25)),
            outcome("whitened", 1, (0.0, 0.0)),
            outcome("whitened", 0, (0.5, 0.0)),
            SearchOutcome(
                SearchJob("demo", "whitened", 0, 1, True, "k"), ((0.5, 0.0),), 3, None, 1.0
            ),
        ],
        REFERENCES | {"demo": (1.0, 0.5)},
    )
    assert [row["method"] for row in rows] == ["mean-difference", "whitened", "whitened"]
    assert [row["cosine"] for row in rows] == [0.9, 0.9, None]
    assert rows[0]["volume"] == spread([25.0, 50.0], 2)
    assert rows[1]["volume"] == {"min": 50.0, "median": 75.0, "max": 100.0}
    assert rows[1]["against"]["median"] == 37.5
    assert rows[1]["against"]["more"] == 2


def test_initial_points_are_compared_after_each_budget() -> None:
    rows = by_budget(
        [
            outcome("mean-difference", 0, (0.0, 0.25), (0.0, 0.25)),
            outcome("mean-difference", 0, (0.5, 0.25), (0.0, 0.0), seed_points=False),
        ],
        REFERENCES,
        (1, 2),
    )
    assert [(row["budget"], row["against"]["median"]) for row in rows] == [(1, 25.0), (2, -50.0)]


def test_searches_are_read_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file, first = tmp_path / "searches.jsonl", outcome("whitened", 0, (0.5, 0.25), None)
    assert read(file) == {}
    append(file, first)
    file.write_text(file.read_text() + first.to_json()[:40])
    assert read(file) == {first.job: first}
    append(file, other := outcome("whitened", 1, (0.0, 0.0)))
    assert read(file) == {first.job: first, other.job: other}
