"""How much of the frontier a budget finds, by how many plans are in flight.

    python -m benchmarks.search_scaling.budget_efficiency [--in-flight 1 4 16 64]
        [--budgets 60 200] [--seeds 12]

A study of the default sampler over the recorded surrogate, on a virtual clock: a trial takes one
unit, more or less, and the search asks as it does over replicas, one plan ahead. No Ray; what is
measured is only what the sampler does not know yet when it is asked.
"""

import heapq
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.recorded_study import SPACE, RecordedPoint, Surrogate, recorded_points
from benchmarks.harness.tables import table
from ray_abliterate.search.frontier import Frontier

BEYOND = 1.1
"""Volumes are measured from a tenth beyond the ends of the recorded frontier."""
AHEAD = 1
"""Plans that are asked for before there is a replica for them, as in `cluster.tune_search`."""
UNEVEN = 0.2
"""Share by which a trial may be longer or shorter than the unit."""


def main() -> None:
    """Play all studies, print, save."""
    parser = CLAIM.parser(in_flight=[1, 4], budgets=[12], seeds=1)
    parser.add_argument(
        "--in-flight", type=int, nargs="+", default=[1, 4, 16, 64], help="plans in flight"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 200], help="trials")
    parser.add_argument("--seeds", type=int, default=12, help="studies of each kind")
    options = parser.parse_args()
    CLAIM.save(measure(options.in_flight, options.budgets, options.seeds), options)


@dataclass(frozen=True)
class StudyKind:
    """What is varied between studies.

    Attributes:
        concurrency: Plans in flight.
        pack: Plans that a replica takes at once, and ends at once.
        liar: Whether the sampler counts plans in flight as bad.
        random_only: Whether plans are drawn at random.
    """

    concurrency: int
    pack: int = 1
    liar: bool = True
    random_only: bool = False

    @property
    def replicas(self) -> int:
        """Number of replicas that take plans."""
        return self.concurrency // self.pack

    @property
    def name(self) -> str:
        """Name of the kind in tables."""
        if self.random_only:
            return "random plans"
        packed = f", {self.pack} a pass" if self.pack > 1 else ""
        return f"{self.concurrency} in flight{packed}"


def study_kinds(concurrencies: Sequence[int]) -> list[StudyKind]:
    """Return all kinds that are compared: with and without the liar, packed by four, random."""
    plain = [
        StudyKind(count, liar=liar)
        for count in concurrencies
        for liar in (True, False)
        if count > 1 or liar
    ]
    packed = [StudyKind(count, pack=4) for count in concurrencies if count >= 4]
    return [*plain, *packed, StudyKind(1, random_only=True)]


def play(
    ask: Callable[[], Any],
    report: Callable[[Any], None],
    trials: int,
    kind: StudyKind,
    seed: int,
) -> float:
    """Run a study on a virtual clock; return the units of time until its last trial ends.

    Args:
        ask: Returns the next plan.
        report: Takes a plan that has ended.
        trials: Plans in all.
        kind: How many are in flight, and whether packed.
        seed: Seed of the trials' durations.
    """
    durations = random.Random(seed)
    waiting: deque[Any] = deque()
    running: list[tuple[float, int, list[Any]]] = []  # end, order of starting, plans
    now, asked, in_flight, started = 0.0, 0, 0, 0
    while True:
        while asked < trials and in_flight < kind.concurrency + AHEAD:
            waiting.append(ask())
            asked, in_flight = asked + 1, in_flight + 1
        while len(running) < kind.replicas and (
            len(waiting) >= kind.pack or (waiting and asked == trials)
        ):
            group = [waiting.popleft() for _ in range(min(kind.pack, len(waiting)))]
            ends = now + durations.uniform(1 - UNEVEN, 1 + UNEVEN)
            started += 1
            heapq.heappush(running, (ends, started, group))
        if not running:
            return now
        now, _, group = heapq.heappop(running)
        for plan in group:
            report(plan)
        in_flight -= len(group)


def run_study(
    surrogate: Surrogate, kind: StudyKind, trials: int, seed: int
) -> tuple[list[RecordedPoint], float]:
    """Return the points of one study in the order in which they ended, and its duration."""
    import optuna

    from ray_abliterate.recipe import SearchSettings
    from ray_abliterate.search.study import make_sampler, optuna_distributions

    startup = trials if kind.random_only else None
    settings = SearchSettings(trials=trials, seed=seed, startup_trials=startup)
    sampler = make_sampler(settings, 0)
    sampler._constant_liar = kind.liar
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions = optuna_distributions(SPACE)
    points: list[RecordedPoint] = []

    def report(asked: Any) -> None:
        point = surrogate.point(asked.params)
        study.tell(asked, [point.rate, point.kl])
        points.append(point)

    return points, play(lambda: study.ask(distributions), report, trials, kind, seed)


def reference_point(points: Sequence[RecordedPoint]) -> tuple[float, float]:
    """Return a rate and a divergence a little worse than the worst of these points' frontier."""
    ends = frontier_points(points)
    return BEYOND * max(p.rate for p in ends), BEYOND * max(p.kl for p in ends)


def hypervolume(points: Sequence[RecordedPoint], worst: tuple[float, float]) -> float:
    """Return the hypervolume of the frontier of some points, measured from `worst`."""
    trials = [point.trial(number) for number, point in enumerate(points)]
    return Frontier.of(trials).hypervolume(worst)


def frontier_points(points: Sequence[RecordedPoint]) -> list[RecordedPoint]:
    """Return the points that no other point dominates."""
    members = Frontier.of(point.trial(n) for n, point in enumerate(points)).members
    return [points[member.number] for member in members]


def measure(concurrencies: Sequence[int], budgets: Sequence[int], seeds: int) -> Figures:
    """Return the volumes of all studies as shares of what they found together.

    Args:
        concurrencies: Numbers of plans in flight.
        budgets: Numbers of trials.
        seeds: Studies of each kind.
    """
    points = recorded_points()
    surrogate, worst = Surrogate(points), reference_point(points)
    runs = []
    best_of_all = list(points)
    for trials in budgets:
        for kind in study_kinds(concurrencies):
            volumes, units = [], []
            for seed in range(seeds):
                study, duration = run_study(surrogate, kind, trials, seed)
                best_of_all = frontier_points([*best_of_all, *study])
                volumes.append(hypervolume(study, worst))
                units.append(duration)
            runs.append((trials, kind, volumes, statistics.median(units)))
            middle = sorted(volumes)[seeds // 2]
            line = f"{trials} trials, {kind.name}, liar {kind.liar}: {middle:.5f}"
            print(line, file=sys.stderr, flush=True)
    most = hypervolume(best_of_all, worst)
    return {
        "seeds": seeds,
        "reference": [round(x, 4) for x in worst],
        "recorded_trials": len(points),
        "left_out_errors": surrogate.left_out_errors,
        "volume_of_all": round(most, 6),
        "recorded_share": round(hypervolume(points, worst) / most, 4),
        "ways": [
            {
                "trials": trials,
                "name": kind.name,
                **asdict(kind),
                "shares": [round(volume / most, 4) for volume in volumes],
                "units": round(units, 1),
            }
            for trials, kind, volumes, units in runs
        ],
    }


def efficiency_table(figures: Figures) -> list[str]:
    """Return what a budget finds, by plans in flight."""
    kinds = figures["ways"]
    budgets = sorted({kind["trials"] for kind in kinds})
    by_key = {(kind["name"], kind["liar"], kind["trials"]): kind for kind in kinds}
    head = ["", *(f"{n} trials{w}" for n in budgets for w in ("", ", no liar")), "time"]
    rows = []
    for name in dict.fromkeys(kind["name"] for kind in kinds):
        cells = [by_key.get((name, liar, n)) for n in budgets for liar in (True, False)]
        longest = by_key[name, True, budgets[-1]]
        shares = [_shares(kind["shares"]) if kind else "" for kind in cells]
        rows.append((name, *shares, f"{longest['units']:.0f}"))
    errors = " and ".join(
        f"{100 * value:.0f} % ({name.replace('_', ' ')})"
        for name, value in figures["left_out_errors"].items()
    )
    note = (
        f"Percent of the hypervolume of all trials of all these studies together: median and range "
        f"of {figures['seeds']} seeds. The {figures['recorded_trials']} recorded trials alone have "
        f"{100 * figures['recorded_share']:.0f} %. The surrogate's error at a recorded trial that "
        f"it was not shown, as a share of the standard deviation: {errors}. Time is that of "
        f"{budgets[-1]} trials, in trials."
    )
    return [*table(head, rows), "", note]


def _shares(values: Sequence[float]) -> str:
    """Return median and range of shares, in percent."""
    ordered = sorted(100 * value for value in values)
    return f"{statistics.median(ordered):.1f} ({ordered[0]:.0f} to {ordered[-1]:.0f})"


CLAIM = Claim(
    "search_scaling.budget_efficiency",
    "How much of the frontier a budget finds, by how many plans are in flight.",
    "scaling-efficiency",
    {"efficiency": efficiency_table},
)

if __name__ == "__main__":
    main()
