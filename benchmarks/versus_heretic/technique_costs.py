"""How much longer a trial takes without each technique that makes it fast."""

import statistics
from typing import Any

from benchmarks.harness.statistics import spread
from benchmarks.harness.worker_process import Worker
from benchmarks.versus_heretic.worker_pair import WorkerPair, call_after_pause
from ray_abliterate.search.plan import Plan

ALL_TECHNIQUES = "all of them"


def technique_costs(pair: WorkerPair, plans: list[Plan]) -> dict[str, Any] | None:
    """Return how many times longer a pass takes with each technique off, by trials per pass.

    Args:
        pair: The loaded processes.
        plans: Plans of the passes.

    Returns:
        None if the options ask for no rounds.
    """
    options = pair.setup.options
    names = next(iter(pair.our_facts.values()))["techniques"]
    if not options.ablation:
        return None
    without = {name: [name] for name in names} | {ALL_TECHNIQUES: list(names)}
    return {
        str(count): slowdowns(
            pair.ours[count], [plan.to_json() for plan in plans[:count]], without, options.ablation
        )
        for count in options.ablation_per_pass
        if count in pair.ours
    }


def slowdowns(
    worker: Worker, plans: list[str], without: dict[str, list[str]], rounds: int
) -> dict[str, Any]:
    """Time passes with all techniques on, and between them one with each switched off.

    Each round is held against the mean of its own two passes with all on. One round before the
    first is not counted: a technique that is switched on again may have to learn again.

    Args:
        worker: Our process.
        plans: Plans of a pass, as JSON.
        without: Techniques that are off, by the name of the row.
        rounds: Rounds that count.

    Returns:
        By row, the median `slowdown`, its `range`, and the seconds with all on.
    """

    def seconds(off: list[str]) -> float:
        return float(call_after_pause(worker, "trial", plans=plans, off=off)["seconds"])

    ratios: dict[str, list[float]] = {name: [] for name in without}
    all_on = []
    for counted in [False, *[True] * rounds]:
        before = seconds([])
        row = {name: seconds(off) for name, off in without.items()}
        on = statistics.mean([before, seconds([])])
        if counted:
            all_on.append(on)
            for name, value in row.items():
                ratios[name].append(value / on)
    return {
        name: {
            "slowdown": round(statistics.median(values), 3),
            "range": spread(values, 3),
            "on_seconds": spread(all_on),
        }
        for name, values in ratios.items()
    }
