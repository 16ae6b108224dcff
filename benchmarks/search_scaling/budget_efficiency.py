"""How much of the frontier a budget finds, by how many plans are in flight; part of `scaling`.

A study of the default sampler over the recorded surrogate, on a virtual clock: a trial takes one
unit, more or less, and the search asks as it does over replicas, one plan ahead. No Ray; what is
measured is only what the sampler does not know yet when it is asked.
"""

import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.recorded_study import SPACE, Point, Surrogate, recorded
from ray_abliterate.search.frontier import Frontier

BEYOND = 1.1
"""Volumes are measured from a tenth beyond the ends of the recorded frontier."""
AHEAD = 1
"""Plans that are asked for before there is a replica for them, as in `cluster.search`."""
UNEVEN = 0.2
"""Share by which a trial may be longer or shorter than the unit."""


@dataclass(frozen=True)
class Way:
    """One way to run a study: what is varied."""

    concurrency: int
    pack: int = 1
    """Plans that a replica takes at once, and ends at once."""
    liar: bool = True
    random_only: bool = False

    @property
    def replicas(self) -> int:
        """How many take plans."""
        return self.concurrency // self.pack

    @property
    def name(self) -> str:
        """For tables."""
        if self.random_only:
            return "random plans"
        packed = f", {self.pack} a pass" if self.pack > 1 else ""
        return f"{self.concurrency} in flight{packed}"


def ways(concurrencies: Sequence[int]) -> list[Way]:
    """All that are compared: each with and without the liar, and packed by four."""
    plain = [Way(c, liar=liar) for c in concurrencies for liar in (True, False) if c > 1 or liar]
    packed = [Way(c, pack=4) for c in concurrencies if c >= 4]
    return [*plain, *packed, Way(1, random_only=True)]


def play(
    ask: Callable[[], Any], tell: Callable[[Any], None], trials: int, way: Way, seed: int
) -> float:
    """Run a study on a virtual clock; returns the units of time until its last trial ends.

    Args:
        ask: Gives the next plan.
        tell: Takes a plan that has ended.
        trials: Plans in all.
        way: How many are in flight, and whether packed.
        seed: Of the trials' durations.
    """
    durations = random.Random(seed)
    waiting: deque[Any] = deque()
    running: list[tuple[float, int, list[Any]]] = []
    now, asked, live, started = 0.0, 0, 0, 0
    while True:
        while asked < trials and live < way.concurrency + AHEAD:
            waiting.append(ask())
            asked, live = asked + 1, live + 1
        while len(running) < way.replicas and (
            len(waiting) >= way.pack or (waiting and asked == trials)
        ):
            group = [waiting.popleft() for _ in range(min(way.pack, len(waiting)))]
            ends = now + durations.uniform(1 - UNEVEN, 1 + UNEVEN)
            started += 1
            heapq.heappush(running, (ends, started, group))
        if not running:
            return now
        now, _, group = heapq.heappop(running)
        for plan in group:
            tell(plan)
        live -= len(group)


def study(surrogate: Surrogate, way: Way, trials: int, seed: int) -> tuple[list[Point], float]:
    """The points of one study in the order in which they ended, and how long it took."""
    import optuna

    from ray_abliterate.recipe import SearchSettings
    from ray_abliterate.search import study as journal

    startup = trials if way.random_only else None
    settings = SearchSettings(trials=trials, seed=seed, startup_trials=startup)
    sampler = journal.sampler(settings, 0)
    sampler._constant_liar = way.liar
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    domains = journal.distributions(SPACE)
    found: list[Point] = []

    def tell(asked: Any) -> None:
        point = surrogate.point(asked.params)
        made.tell(asked, [point.rate, point.kl])
        found.append(point)

    return found, play(lambda: made.ask(domains), tell, trials, way, seed)


def reference(points: Sequence[Point]) -> tuple[float, float]:
    """Rate and divergence a little worse than the worst of these points' frontier."""
    ends = best(points)
    return BEYOND * max(p.rate for p in ends), BEYOND * max(p.kl for p in ends)


def volume(points: Sequence[Point], worst: tuple[float, float]) -> float:
    """Hypervolume of the frontier of some points."""
    trials = [point.trial(number) for number, point in enumerate(points)]
    return Frontier.of(trials).hypervolume(worst)


def figures(
    concurrencies: Sequence[int], budgets: Sequence[int], seeds: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Every way with every budget: volumes as shares of what all studies found together."""
    points = recorded()
    surrogate, worst = Surrogate(points), reference(points)
    runs = []
    everything = list(points)
    for trials in budgets:
        for way in ways(concurrencies):
            volumes, units = [], []
            for seed in range(seeds):
                found, duration = study(surrogate, way, trials, seed)
                everything = best([*everything, *found])
                volumes.append(volume(found, worst))
                units.append(duration)
            runs.append((trials, way, volumes, statistics.median(units)))
            report(
                f"{trials} trials, {way.name}, liar {way.liar}: {sorted(volumes)[seeds // 2]:.5f}"
            )
    most = volume(everything, worst)
    return {
        "seeds": seeds,
        "reference": [round(x, 4) for x in worst],
        "recorded_trials": len(points),
        "left_out_errors": surrogate.left_out_errors,
        "volume_of_all": round(most, 6),
        "recorded_share": round(volume(points, worst) / most, 4),
        "ways": [
            {
                "trials": trials,
                "name": way.name,
                **asdict(way),
                "shares": [round(one / most, 4) for one in volumes],
                "units": round(units, 1),
            }
            for trials, way, volumes, units in runs
        ],
    }


def best(points: Sequence[Point]) -> list[Point]:
    """The points of the frontier."""
    members = Frontier.of(point.trial(n) for n, point in enumerate(points)).members
    return [points[member.number] for member in members]
