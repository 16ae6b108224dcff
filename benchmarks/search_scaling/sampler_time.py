"""What asking for plans and reporting scores cost as a study grows.

    python -m benchmarks.search_scaling.sampler_time [--sizes 200 1000 5000]

The study of a search: its sampler, its journal on a disk, what it writes per trial, 16 plans in
flight. It is filled with random plans that the recorded surrogate scores; at each size the sampler
then takes over for some trials, each timed. For comparison, at the same trials: the study in
memory, and the sampler without parts of what it does. No Ray.
"""

import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.default_search import GOALS, default_settings, default_space
from benchmarks.harness.memory import resident_bytes
from benchmarks.harness.recorded_study import SPACE, Surrogate, recorded_points
from benchmarks.harness.tables import table
from benchmarks.harness.worker_process import call_in_new_process
from ray_abliterate.search.frontier import SCORES, SECONDS
from ray_abliterate.search.space import RealRange

IN_FLIGHT = 16


def main() -> None:
    """Measure a growing study, print, save."""
    parser = CLAIM.parser(sizes=[40], timed=2)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[200, 1000, 5000], help="trials of the study"
    )
    parser.add_argument("--timed", type=int, default=30, help="trials that are timed at each size")
    options = parser.parse_args()
    CLAIM.save(measure(options.sizes, options.timed), options)


def measure(sizes: Sequence[int], timed: int) -> Figures:
    """Return times, bytes and baselines at each size of the study.

    Args:
        sizes: Numbers of trials, ascending.
        timed: Trials that are asked for and reported at each size.
    """
    warnings.simplefilter("ignore")  # Optuna's, that its constant liar is experimental
    surrogate = Surrogate(recorded_points())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "study.journal"
        rows = []
        study = GrowingStudy(_open(file), surrogate)
        for size in sizes:
            study.grow(size)
            rows.append(_measure_size(size, study, file, timed))
            print(f"{size} trials: {rows[-1]}", file=sys.stderr, flush=True)
        study.finish_all()
        resumed = call_in_new_process(reopen, str(file))
        resumed["journal_bytes"] = file.stat().st_size
    return {"in_flight": IN_FLIGHT, "timed": timed, "sizes": rows, "resumed": resumed}


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock, which waits for the disk too, and of the processor."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Timing":
        """Return the seconds since some beginning."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, begin: "Timing") -> "Timing":
        """Return the seconds since `begin`, which `now` returned."""
        now = cls.now()
        return cls(now.clock - begin.clock, now.processor - begin.processor)


class GrowingStudy:
    """A study with plans in flight that can be grown and timed.

    Attributes:
        study: Optuna's.
        surrogate: Scores its trials.
    """

    def __init__(self, study: Any, surrogate: Surrogate) -> None:
        from ray_abliterate.search.study import optuna_distributions

        self.study, self.surrogate = study, surrogate
        self._distributions = optuna_distributions(default_space())
        self._in_flight: list[Any] = []

    def fill(self) -> "GrowingStudy":
        """Ask until `IN_FLIGHT` plans are in flight, and return this study."""
        while len(self._in_flight) < IN_FLIGHT:
            self._in_flight.append(self.study.ask(self._distributions))
        return self

    def ask(self) -> Timing:
        """Ask for one plan more."""
        begin = Timing.now()
        self._in_flight.append(self.study.ask(self._distributions))
        return Timing.since(begin)

    def report(self) -> Timing:
        """End the oldest plan in flight and report its scores as a search does."""
        asked = self._in_flight.pop(0)
        card = surrogate_scores(self.surrogate, asked.params)
        text = json.dumps(card.to_list())
        begin = Timing.now()
        asked.set_user_attr(SCORES, text)
        asked.set_user_attr(SECONDS, 5.0)
        self.study.tell(asked, [score.value for score in card.scores])
        return Timing.since(begin)

    def grow(self, trials: int) -> None:
        """Try random plans until so many trials have ended, with plans in flight all along."""
        import optuna

        sampler, self.study.sampler = self.study.sampler, optuna.samplers.RandomSampler(trials)
        ended = len(self.study.get_trials(deepcopy=False)) - len(self._in_flight)
        self.fill()
        for _ in range(trials - ended):
            self.report()
            self.ask()
        self.study.sampler = sampler

    def finish_surplus(self) -> None:
        """End plans until no more than `IN_FLIGHT` are in flight."""
        while len(self._in_flight) > IN_FLIGHT:
            self.report()

    def finish_all(self) -> None:
        """End all plans in flight."""
        while self._in_flight:
            self.report()

    def time_trials(self, count: int) -> dict[str, dict[str, float]]:
        """Return what asking and reporting take, over so many trials."""
        pairs = [(self.report(), self.ask()) for _ in range(count)]
        return {
            "ask": _milliseconds([ask for _, ask in pairs]),
            "tell": _milliseconds([report for report, _ in pairs]),
        }

    def profile(self, count: int) -> dict[str, float]:
        """Return milliseconds of each part of asking, over so many plans.

        They are measured under a profiler, which makes what is Python look longer.
        """
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(count):
            self.ask()
        profile.disable()
        rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        milliseconds = dict.fromkeys(OPTUNA_PARTS, 0.0)
        for (file, _, function), row in rows.items():
            for part, (ending, name) in OPTUNA_PARTS.items():
                if function == name and file.endswith(ending):
                    milliseconds[part] += 1000 * row[3] / count
        return {part: round(value, 2) for part, value in milliseconds.items()}


OPTUNA_PARTS = {
    "split into good and rest": ("sampler.py", "_split_trials"),
    "parameters of all trials to numbers": ("sampler.py", "_get_internal_repr"),
    "densities of the candidates": ("sampler.py", "_compute_acquisition_func"),
    "trials from the storage": ("_storage.py", "get_all_trials"),
    "writing the journal": ("_file.py", "append_logs"),
}
"""Where the time of asking goes: files and functions of Optuna."""


def surrogate_scores(surrogate: Surrogate, params: dict[str, Any]) -> Any:
    """Return the scorecard of a trial of a model with 32 layers.

    Layers are scaled to the same share of the recorded model's layers.
    """
    scaled = {}
    parameters = zip(default_space().parameters, SPACE.parameters, strict=True)
    for (name, domain), (_, recorded) in parameters:
        value = params[name]
        if isinstance(domain, RealRange) and isinstance(recorded, RealRange):
            share = (value - domain.low) / (domain.high - domain.low)
            value = recorded.low + share * (recorded.high - recorded.low)
        scaled[name] = value
    return surrogate.point(scaled).trial(0).scorecard


def _open(file: Path) -> Any:
    """Open the study of a journal, or create it, as a search does."""
    import optuna

    from ray_abliterate.search.study import STUDY_NAME, make_sampler, open_storage

    return optuna.create_study(
        storage=open_storage(file),
        study_name=STUDY_NAME,
        directions=[goal for _, goal in GOALS],
        sampler=make_sampler(default_settings(200), 0),
        load_if_exists=True,
    )


def _measure_size(size: int, study: GrowingStudy, file: Path, timed: int) -> dict[str, Any]:
    """Return everything at one size."""
    before = file.stat().st_size
    times = study.time_trials(timed)
    written = (file.stat().st_size - before) / timed
    row = {
        "trials": size,
        **times,
        "journal_bytes_per_trial": round(written),
        "beside": {
            name: GrowingStudy(baseline, study.surrogate).fill().time_trials(timed)["ask"]
            for name, baseline in _baselines(study.study)
        },
        "parts_ms": study.profile(timed),
    }
    study.finish_surplus()
    return row


def _baselines(study: Any) -> Iterator[tuple[str, Any]]:
    """Yield studies in memory with the same trials: the search's sampler, then simpler ones."""
    import optuna

    from ray_abliterate.search.study import make_sampler

    default = default_settings(200)
    without_liar = make_sampler(default, 0)
    without_liar._constant_liar = False
    samplers = {
        "in memory": make_sampler(default, 0),
        "in memory, Optuna's TPE as it is": optuna.samplers.TPESampler(
            n_startup_trials=default.startup,
            n_ei_candidates=default.ei_candidates,
            multivariate=True,
            seed=0,
        ),
        "in memory, without the liar": without_liar,
        "in memory, 24 candidates": make_sampler(
            default.model_copy(update={"ei_candidates": 24}), 0
        ),
        "in memory, random plans": optuna.samplers.RandomSampler(0),
    }
    ended = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    for name, sampler in samplers.items():
        copied = optuna.create_study(
            directions=[goal for _, goal in GOALS],
            sampler=sampler,
            storage=optuna.storages.InMemoryStorage(),
        )
        copied.add_trials(ended)
        yield name, copied


def _milliseconds(times: Sequence[Timing]) -> dict[str, float]:
    clock = sorted(1000 * timing.clock for timing in times)
    processor = [1000 * timing.processor for timing in times]
    return {
        "median_ms": round(statistics.median(clock), 2),
        "min_ms": round(clock[0], 2),
        "max_ms": round(clock[-1], 2),
        "processor_ms": round(statistics.median(processor), 2),
    }


def reopen(file: str) -> dict[str, Any]:
    """Open a journal in this process and return the seconds and bytes that it takes."""
    from ray_abliterate.search.study import finished_trials

    space = default_space()
    before, begin = resident_bytes(), time.perf_counter()
    study = _open(Path(file))
    opened = time.perf_counter()
    trials = finished_trials(study, space)
    return {
        "trials": len(trials),
        "open_seconds": round(opened - begin, 2),
        "outcomes_seconds": round(time.perf_counter() - opened, 2),
        "resident_bytes": resident_bytes() - before,
    }


def sampler_table(figures: Figures) -> list[str]:
    """Return the times of asking and reporting by the size of the study."""
    sizes = figures["sizes"]
    rows = [
        ("asking, as a search does", *(_clock(size["ask"]) for size in sizes)),
        ("telling, as a search does", *(_clock(size["tell"]) for size in sizes)),
        *(
            (f"asking, {name}", *(_clock(size["beside"][name]) for size in sizes))
            for name in sizes[0]["beside"]
        ),
    ]
    heads = [f"{size['trials']:,} trials, ms" for size in sizes]
    resumed, size = figures["resumed"], sizes[-1]["journal_bytes_per_trial"]
    note = (
        f"Median, and in brackets the processor's share of it. The journal takes {size:,} bytes "
        f"a trial; to open one of {resumed['trials']:,} trials takes "
        f"{resumed['open_seconds'] + resumed['outcomes_seconds']:.1f} s and "
        f"{resumed['resident_bytes'] / resumed['trials'] / 1000:.0f} kB of memory a trial."
    )
    return [*table(("", *heads), rows), "", note]


def _clock(values: dict[str, float]) -> str:
    """Return milliseconds by the clock, and in brackets of the processor."""
    return f"{values['median_ms']:.1f} ({values['processor_ms']:.1f})"


CLAIM = Claim(
    "search_scaling.sampler_time",
    "What asking for plans and reporting scores cost as a study grows.",
    "scaling-sampler",
    {"sampler": sampler_table},
)

if __name__ == "__main__":
    main()
