"""What asking and telling cost as a study grows; part of `scaling`.

The study of a search: its sampler, its journal on a disk, what it writes per trial, 16 plans in
flight. It is filled with random plans that the recorded surrogate scores; at each size the sampler
then takes over for some trials, each timed. Beside it, at the same trials: the study in memory, and
the sampler without parts of what it does. No Ray.
"""

import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.recorded_study import SPACE, Surrogate, recorded
from benchmarks.search_overhead import GOALS, settings, space
from ray_abliterate.cluster.tune_trial import SCORES, SECONDS
from ray_abliterate.search import study as journal
from ray_abliterate.search.plan import Range

IN_FLIGHT = 16
TIMED = 30
"""Trials that are asked for and told at each size."""

Report = Callable[[str], None]


def scores(surrogate: Surrogate, params: dict[str, Any]) -> Any:
    """A trial of a model of 32 layers, scored as the same share of the recorded one's layers."""
    scaled = {}
    for (name, own), (_, other) in zip(space().parameters, SPACE.parameters, strict=True):
        value = params[name]
        if isinstance(own, Range) and isinstance(other, Range):
            share = (value - own.low) / (own.high - own.low)
            value = other.low + share * (other.high - other.low)
        scaled[name] = value
    return surrogate.point(scaled).trial(0).scorecard


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of the processor: the first wait for the disk, and for others."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Spent":
        """Since some beginning."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, begin: "Spent") -> "Spent":
        """Since then."""
        now = cls.now()
        return cls(now.clock - begin.clock, now.processor - begin.processor)


class Filled:
    """A study with plans in flight, that can be grown and timed."""

    def __init__(self, study: Any, surrogate: Surrogate) -> None:
        self.study, self._surrogate = study, surrogate
        self._domains = journal.distributions(space())
        self._flying: list[Any] = []

    def fly(self, count: int) -> None:
        """Ask until so many plans are in flight."""
        while len(self._flying) < count:
            self._flying.append(self.study.ask(self._domains))

    def ask(self) -> Spent:
        """One plan more."""
        begin = Spent.now()
        self._flying.append(self.study.ask(self._domains))
        return Spent.since(begin)

    def tell(self) -> Spent:
        """The oldest plan ends, and is told as a search does."""
        asked = self._flying.pop(0)
        card = scores(self._surrogate, asked.params)
        text = json.dumps(card.to_list())
        begin = Spent.now()
        asked.set_user_attr(SCORES, text)
        asked.set_user_attr(SECONDS, 5.0)
        self.study.tell(asked, [score.value for score in card.scores])
        return Spent.since(begin)

    def grow(self, trials: int) -> None:
        """Random plans until so many trials have ended, with plans in flight all along."""
        import optuna

        own, self.study.sampler = self.study.sampler, optuna.samplers.RandomSampler(trials)
        ended = len(self.study.get_trials(deepcopy=False)) - len(self._flying)
        self.fly(IN_FLIGHT)
        for _ in range(trials - ended):
            self.tell()
            self.ask()
        self.study.sampler = own

    def resume(self) -> "Filled":
        """Itself, with plans in flight."""
        self.fly(IN_FLIGHT)
        return self

    def surplus(self) -> bool:
        """More plans are in flight than should be."""
        return len(self._flying) > IN_FLIGHT

    def land(self) -> None:
        """All plans in flight end."""
        while self._flying:
            self.tell()

    def timed(self) -> dict[str, dict[str, float]]:
        """What asking and telling take, over a few times."""
        pairs = [(self.tell(), self.ask()) for _ in range(TIMED)]
        return {
            "ask": _spread([ask for _, ask in pairs]),
            "tell": _spread([tell for tell, _ in pairs]),
        }


PARTS = {
    "split into good and rest": ("sampler.py", "_split_trials"),
    "parameters of all trials to numbers": ("sampler.py", "_get_internal_repr"),
    "densities of the candidates": ("sampler.py", "_compute_acquisition_func"),
    "trials from the storage": ("_storage.py", "get_all_trials"),
    "writing the journal": ("_file.py", "append_logs"),
}
"""Where the time of asking goes: files and functions of Optuna."""


def parts(ask: Callable[[], Spent]) -> dict[str, float]:
    """Milliseconds of each part, under a profiler (which makes what is Python look longer)."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(TIMED):
        ask()
    profile.disable()
    rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), row in rows.items():
        for part, (ending, name) in PARTS.items():
            if function == name and file.endswith(ending):
                found[part] += 1000 * row[3] / TIMED
    return {part: round(value, 2) for part, value in found.items()}


def figures(sizes: Sequence[int], report: Report) -> dict[str, Any]:
    """Times, bytes and baselines at each size of the study."""
    warnings.simplefilter("ignore")  # Optuna's, that its constant liar is experimental
    surrogate = Surrogate(recorded())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "study.journal"
        rows = []
        filled = Filled(_opened(file), surrogate)
        for size in sizes:
            filled.grow(size)
            rows.append(_at(size, filled, file, surrogate))
            report(f"{size} trials: {rows[-1]}")
        filled.land()
        resumed = _resumed(file)
    return {"in_flight": IN_FLIGHT, "timed": TIMED, "sizes": rows, "resumed": resumed}


def _opened(file: Path) -> Any:
    import optuna

    return optuna.create_study(
        storage=journal.open_storage(file),
        study_name=journal.STUDY_NAME,
        directions=[goal for _, goal in GOALS],
        sampler=journal.sampler(settings(200), 0),
        load_if_exists=True,
    )


def _at(size: int, filled: Filled, file: Path, surrogate: Surrogate) -> dict[str, Any]:
    """Everything at one size."""
    before = file.stat().st_size
    timed = filled.timed()
    written = (file.stat().st_size - before) / TIMED
    row = {
        "trials": size,
        **timed,
        "journal_bytes_per_trial": round(written),
        "beside": {
            name: Filled(study, surrogate).resume().timed()["ask"]
            for name, study in _baselines(filled.study)
        },
    }
    row["parts_ms"] = parts(filled.ask)
    while filled.surplus():
        filled.tell()
    return row


def _baselines(study: Any) -> Iterator[tuple[str, Any]]:
    """Studies in memory with the same trials: the search's sampler, and with less and less."""
    import optuna

    default = settings(200)
    honest = journal.sampler(default, 0)
    honest._constant_liar = False
    samplers = {
        "in memory": journal.sampler(default, 0),
        "in memory, Optuna's TPE as it is": optuna.samplers.TPESampler(
            n_startup_trials=default.startup,
            n_ei_candidates=default.ei_candidates,
            multivariate=True,
            seed=0,
        ),
        "in memory, without the liar": honest,
        "in memory, 24 candidates": journal.sampler(
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


def _spread(values: Sequence[Spent]) -> dict[str, float]:
    clock = sorted(1000 * spent.clock for spent in values)
    processor = [1000 * spent.processor for spent in values]
    return {
        "median_ms": round(statistics.median(clock), 2),
        "min_ms": round(clock[0], 2),
        "max_ms": round(clock[-1], 2),
        "processor_ms": round(statistics.median(processor), 2),
    }


RESUME = """
import json, sys, time
import psutil
from pathlib import Path
from benchmarks.search_overhead import space
from benchmarks.search_scaling.sampler_time import _opened, journal
resident = lambda: psutil.Process().memory_info().rss
before, begin = resident(), time.perf_counter()
study = _opened(Path(sys.argv[1]))
opened = time.perf_counter()
outcomes = journal.outcomes(study, space())
print(json.dumps({
    "trials": len(outcomes),
    "open_seconds": round(opened - begin, 2),
    "outcomes_seconds": round(time.perf_counter() - opened, 2),
    "resident_bytes": resident() - before,
}))
"""


def _resumed(file: Path) -> dict[str, Any]:
    """Opening the journal in a new process: seconds, and memory."""
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(file)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "journal_bytes": file.stat().st_size}
