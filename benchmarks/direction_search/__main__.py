"""All direction methods at the same search budget; and whether a search's seed points pay.

    python -m benchmarks.direction_search [--part methods seeds] [--models clean demo …]
        [--seed-models clean …] [--methods whitened …] [--seeds 5] [--jobs 2]
        [--save direction_search]

Searches as runs make them (space, sampler, scorers), on three planted models and the demo's (see
`direction_models`), one plan at a time and without Ray. A seed draws the prompts that directions
come from and is the sampler's, too; it is the same for all methods, so that they are compared seed
by seed. Every finished search is a line of a file in `--work`: a run that is stopped goes on there.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.direction_search.hypervolumes import (
    BASE,
    Job,
    Outcome,
    append,
    by_budget,
    by_method,
    key_of,
    read,
)
from benchmarks.direction_search.models import (
    EXTRACTED,
    METHODS,
    REFERENCES,
    SUBJECTS,
    Bench,
    model_folder,
)
from benchmarks.harness.record import save

PARTS = ("methods", "seeds")
BUDGETS = (20, 40, 80)
"""Plans after which searches with and without seed points are compared."""
SEARCHES = "searches.jsonl"


def main() -> None:
    """Search what is not there yet, sum up, save."""
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    for model in {*options.models, *(options.seed_models or ())}:
        model_folder(model, options.work)
    file = options.work / SEARCHES
    known = read(file)
    jobs = list(dict.fromkeys(job for part in options.part for job in wanted(options, part)))
    missing = [job for job in jobs if job not in known]
    print(f"{len(jobs)} searches, {len(jobs) - len(missing)} of them are finished", flush=True)
    for outcome in told(searched(missing, options.work, options.jobs), missing):
        append(file, outcome)
        known[outcome.job] = outcome
    parts = {part: [known[job] for job in wanted(options, part)] for part in options.part}
    print(save("direction_search", figures(parts), options.save))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    add("--seed-models", nargs="+", choices=list(SUBJECTS), default=None, help="of the part seeds")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--trials", type=int, default=0, help="plans of a search; each model's own if unset")
    add("--seeds", type=int, default=5)
    add("--jobs", type=int, default=1, help="processes, each with a thread and a model")
    add("--work", type=Path, default=Path("runs/direction_search"), help="finished searches")
    add("--save", default="direction_search", help="name of the file under results/")
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1 or options.trials < 0:
        parser.error("--seeds and --jobs are 1 or more, --trials 0 or more")
    return options


def wanted(options: argparse.Namespace, part: str) -> list[Job]:
    """The searches of a part, model by model, seed by seed."""
    found = []
    models = options.models if part == "methods" else options.seed_models or options.models
    for model in models:
        trials = options.trials or SUBJECTS[model].trials
        for seed in range(options.seeds):
            if part == "methods":
                found += [job(model, method, seed, trials, True) for method in options.methods]
            else:
                found += [job(model, BASE, seed, BUDGETS[-1], way) for way in (True, False)]
    return found


def job(model: str, method: str, seed: int, trials: int, seed_points: bool) -> Job:
    """A search, with the digest of what it is of."""
    key = key_of(SUBJECTS[model], METHODS[method], EXTRACTED)
    return Job(model, method, seed, trials, seed_points, key)


def quiet() -> None:
    """Blocks below the planted ones know nothing of the behaviour, at every seed: no news."""
    logging.getLogger("ray_abliterate.directions.compute").setLevel(logging.ERROR)


def searched(jobs: Sequence[Job], work: Path, processes: int) -> Iterator[Outcome]:
    """What jobs find, as they end."""
    if processes == 1:
        yield from (search(job, work) for job in jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, get_context("spawn"), quiet) as pool:
        try:
            for future in as_completed([pool.submit(search, job, work) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def search(job: Job, work: Path) -> Outcome:
    """One search in this process, which keeps the model for the next one."""
    return _bench(job.model, work).run(job)


@cache
def _bench(model: str, work: Path) -> Bench:
    return Bench(model, work)


def told(outcomes: Iterable[Outcome], jobs: Sequence[Job]) -> Iterator[Outcome]:
    """The same, with a line each: what was found, and how long the rest may take."""
    started, plans = time.perf_counter(), 0
    left = dict.fromkeys(jobs)
    for count, outcome in enumerate(outcomes, start=1):
        found = outcome.job
        del left[found]
        plans += found.trials
        pace = (time.perf_counter() - started) / plans
        minutes = pace * sum(each.trials for each in left) / 60
        volume = outcome.volume(REFERENCES[found.model])
        way = "" if found.seed_points else ", no seed points"
        print(
            f"[{count}/{len(jobs)}] {found.model}, {found.method}, seed {found.seed}, "
            f"{found.trials} plans{way}: {volume:.1f} %, {outcome.seconds:.0f} s; "
            f"{minutes:.0f} min left",
            flush=True,
        )
        yield outcome


def figures(parts: dict[str, list[Outcome]]) -> dict[str, Any]:
    """What the tables are made of."""
    outcomes = list({o.job: o for found in parts.values() for o in found}.values())
    compared = parts.get("methods", [])
    return {
        "seeds": len({outcome.job.seed for outcome in outcomes}),
        "models": {
            name: {
                "reference": list(REFERENCES[name]),
                "trials": max((o.job.trials for o in compared if o.job.model == name), default=0),
                "failed": sum(o.found.count(None) for o in outcomes if o.job.model == name),
                "seconds_per_plan": pace([o for o in outcomes if o.job.model == name]),
            }
            for name in dict.fromkeys(outcome.job.model for outcome in outcomes)
        },
        "methods": by_method(compared, REFERENCES),
        "budgets": by_budget(parts.get("seeds", []), REFERENCES, BUDGETS),
    }


def pace(outcomes: Sequence[Outcome]) -> float:
    """Seconds a plan, directions and sampler with it."""
    plans = sum(outcome.job.trials for outcome in outcomes)
    return round(sum(outcome.seconds for outcome in outcomes) / plans, 3)


if __name__ == "__main__":
    quiet()
    main()
