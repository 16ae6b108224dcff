"""Spreads, ratios and agreements."""

import pytest

from benchmarks.harness.statistics import (
    equal_verdicts,
    paired_differences,
    same_kl,
    time_ratio,
)


def test_a_pass_of_several_trials_is_compared_by_the_trial():
    ratio = time_ratio([2.0, 4.0], [3.0, 5.0, 6.0, 10.0], trials_per_pass=2)
    assert ratio["ours_seconds"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert ratio["ratio"] == pytest.approx(5.5 / 1.5, abs=0.01)
    assert ratio["paired"] == {"min": 4.0, "median": 4.0, "max": 4.0}
    with pytest.raises(ValueError, match="passes"):
        time_ratio([2.0], [3.0], trials_per_pass=2)


def test_equal_verdicts_are_counted_over_trials_and_prompts():
    assert equal_verdicts(["0110", "1111"], ["0111", "1111"]) == {"equal": 7, "verdicts": 8}


@pytest.mark.parametrize(
    ("ours", "peer", "same"), [(0.1605, 0.16050005, True), (0.16, 0.1605, False), (0, 1e-5, True)]
)
def test_kl_divergences_are_the_same_to_three_digits(ours, peer, same):
    assert same_kl(ours, peer) is same


def test_differences_are_taken_at_the_same_seed() -> None:
    assert paired_differences({0: 10.0, 1: 20.0, 2: 5.0}, {2: 5.0, 1: 15.0, 0: 12.0, 3: 99.0}) == {
        "min": -2.0,
        "median": 0.0,
        "max": 5.0,
        "more": 1,
        "less": 1,
        "seeds": 3,
    }
    assert paired_differences({0: 1.0}, {1: 1.0}) == {}
