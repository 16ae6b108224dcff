"""Throughput of a search: its arithmetic."""

import pytest

from benchmarks.search_scaling.throughput import CpuTally, cpu_per_trial, doublings, share_of_ideal


def test_the_most_gpus_are_measured_even_if_no_power_of_two() -> None:
    assert doublings(1) == [1]
    assert doublings(16) == [1, 2, 4, 8, 16]
    assert doublings(12) == [1, 2, 4, 8, 12]


def trials_of(*begun: float) -> list[dict[str, float]]:
    """Return trials of two seconds by when they began."""
    return [{"began": 10.0 + at, "ended": 12.0 + at} for at in begun]


def test_ideal_is_every_gpu_busy_from_when_most_are_to_the_last_end() -> None:
    share = share_of_ideal(trials_of(0, 0, 3, 3), gpus=2, seconds=2.0)
    assert share["seconds"] == 5.0 and share["efficiency"] == pytest.approx(0.8)
    assert share["ideal_per_hour"] == 3600 and share["trials_per_hour"] == 2880


def test_a_trial_process_that_comes_late_counts_from_then_on_for_all() -> None:
    """The first has two trials behind it, and is in the middle of its third."""
    share = share_of_ideal(trials_of(0, 2, 4, 5, 6, 7), gpus=2, seconds=2.0)
    assert share["seconds"] == 4.0 and share["efficiency"] == pytest.approx(3.5 / 4)


def test_processor_time_is_counted_between_two_moments() -> None:
    first = CpuTally(0.0, {"driver": 3.0}, ())
    last = CpuTally(9.0, {"driver": 4.0, "pool": 0.5}, ())
    assert cpu_per_trial(first, last, 10) == {"driver": 0.1, "pool": 0.05}
