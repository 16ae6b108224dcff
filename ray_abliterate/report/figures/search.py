"""Draw how the search went: the growth of the frontier, and the seconds of each trial."""

import math
from statistics import median

from ray_abliterate.report.figures.plotly_parts import Figure, figure, line, marks, view
from ray_abliterate.report.run_data import RunData
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.score_text import number_text


def progress_figures(run: RunData) -> dict[str, Figure]:
    """Return figures of the frontier's hypervolume over trials, and of each trial's seconds."""
    runs: list[Figure] = []
    for name, trials, color in (
        ("finished", [trial for trial, _ in run.finished], "c0"),
        ("stopped early", [trial for trial, _ in run.pruned], "muted"),
        ("failed", run.failed, "c1"),
    ):
        hover = [f"trial {trial.number}: {trial.seconds:.1f} s" for trial in trials]
        mark = {"size": 8, "color": f"var(--{color})", "symbol": "x" if color == "c1" else "circle"}
        x = [trial.number for trial in trials]
        runs += [marks(name, x, [t.seconds for t in trials], hover, mark)] if trials else []
    y = {"title": {"text": "seconds"}, "rangemode": "tozero"}
    seconds = [view("seconds", runs, "trial number", y)] if runs else []
    took = sorted(trial.seconds for trial in run.trials)
    alt = f"From {took[0]:.1f} to {took[-1]:.1f} s, median {median(took):.1f} s." if took else ""
    return {
        "hypervolume": _hypervolume(run),
        "seconds": figure("Seconds of every trial", "", seconds, alt),
    }


def _hypervolume(run: RunData) -> Figure:
    title = "Hypervolume of the frontier so far"
    if not run.best or len(run.objectives) > 3:
        return figure(title, "", [])
    columns = list(zip(*(card.losses for card in run.best), strict=True))
    ideal = [min(column) for column in columns]
    base = run.baseline.losses if run.baseline else tuple(ideal)
    worst = [max(*column, b) for column, b in zip(columns, base, strict=True)]
    reference = [w + 0.1 * (w - i or 1.0) for w, i in zip(worst, ideal, strict=True)]
    box = math.prod(r - i for r, i in zip(reference, ideal, strict=True))
    frontier, shares = Frontier(()), []
    for trial, _ in run.finished:
        frontier = Frontier.of((*frontier.members, trial))
        shares.append(frontier.hypervolume(reference) / box)
    signs = [-1 if score.goal == "maximize" else 1 for score in run.objectives]
    point = ", ".join(
        f"{score.name} {number_text(sign * r)}"
        for score, sign, r in zip(run.objectives, signs, reference, strict=True)
    )
    note = (
        f"Share of the box between the reference point ({point}: a tenth beyond the worst of the "
        "frontier and the base model) and the best value of each objective."
    )
    numbers = [trial.number for trial, _ in run.finished]
    share = line("share", numbers, shares, "c0")
    share["line"]["shape"] = "hv"
    y = {"title": {"text": "share of the box"}, "rangemode": "tozero"}
    alt = f"{number_text(shares[0])} after the first trial, {number_text(shares[-1])} at the end."
    return figure(title, note, [view("share", [share], "trial number", y)], alt)
