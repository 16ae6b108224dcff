"""What is said of a trial as it ends."""

import io

from rich.console import Console

from ray_abliterate.cli.progress_display import LineDisplay, LiveDisplay
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.search.score import Score, Scorecard

PLAN = Plan("global", 1.5, "row", (("mlp", Profile(1.0, 2.0, 0.5, 1.0)),))


def trial(number: int, kl: float, rate: float, bound: bool = False) -> Trial:
    detail = {"hits": int(64 * rate), "total": 64}
    scores = (
        Score("kl", kl, kl, kl),
        Score("rate", rate, rate, 1.0, detail=detail, bound=bound),
    )
    return Trial(number, PLAN, Scorecard(scores), 1.0)


TRIALS = [trial(12, 0.4, 0.125), trial(13, 0.41, 0.25, bound=True)]


def test_a_line_says_why_a_trial_was_stopped() -> None:
    output = io.StringIO()
    progress = LineDisplay(Console(file=output, width=200))
    for done, ended in enumerate(TRIALS, start=1):
        progress.trial(ended, done, 2, Frontier.of(TRIALS[:done]))
    first, second = output.getvalue().splitlines()
    assert "trial 12: kl 0.4  rate 0.125  (frontier)" in first
    assert "trial 13: kl 0.41  rate ≥ 0.25  (stopped early: trial 12 is better)" in second


def test_the_panel_counts_trials_that_were_stopped() -> None:
    progress = LiveDisplay(Console(file=io.StringIO()))
    for done, ended in enumerate(TRIALS, start=1):
        progress.trial(ended, done, 2, Frontier.of(TRIALS[:done]))
    rate = progress._bar.tasks[0].fields["rate"]
    assert rate.endswith(", 1 stopped early")
