"""Tables and sentences about trials in the terminal."""

import pytest

from ray_abliterate.cli.tables import count_trials, finding_text, frontier_table
from ray_abliterate.pipeline.suite_results import Finding
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.score import Score
from tests.cli.test_progress_display import TRIALS, trial


@pytest.mark.parametrize(("wanted", "count"), [(None, "2 trials"), (6, "2 of 6 trials")])
def test_trials_are_counted_by_how_they_ended(wanted: int | None, count: str) -> None:
    assert count_trials(TRIALS, wanted) == f"{count}, 1 stopped early, 0 failed"


def test_a_thinned_frontier_keeps_both_ends_and_says_how_many_there_are() -> None:
    trials = [trial(number, kl=0.1 * number, rate=1 - 0.1 * number) for number in range(8)]
    table = frontier_table(Frontier.of(trials), rows=3)
    numbers = [str(cell).removesuffix(" ◆") for cell in table.columns[0].cells]
    assert (numbers[0], numbers[-1], len(numbers)) == ("0", "7", 3)
    assert table.caption == "3 of 8 trials on the frontier"


def test_a_suite_that_was_not_measured_to_its_end_has_a_star() -> None:
    assert finding_text(None) == ""
    score = Score("accuracy", 0.5, 0.4, 0.6)
    assert finding_text(Finding(score, None, whole=True)) == "0.5 [0.4, 0.6]"
    assert finding_text(Finding(score, None, whole=False)) == "0.5 [0.4, 0.6] *"
    assert finding_text(Finding(None, None, whole=True)) == "measured"
