"""All direction methods at the same search budget; and whether a search's initial points pay.

    python -m benchmarks.direction_search [--part methods seeds] [--models clean demo …]
        [--seed-models clean …] [--methods whitened …] [--seeds 5] [--jobs 2]
        [--save direction_search]

Searches as runs make them (space, sampler, scorers), on three planted models and the demo's (see
`models`), one plan at a time and without Ray. A seed draws the prompts that directions come from
and is the sampler's, too; it is the same for all methods, so that they are compared seed by seed.
Every finished search is a line of a file in `--work`: when stopped, the benchmark resumes there.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.direction_search.hypervolumes import (
    BASE,
    SearchJob,
    SearchOutcome,
    append,
    by_budget,
    by_method,
    read,
)
from benchmarks.direction_search.models import (
    METHODS,
    REFERENCES,
    SUBJECTS,
    SearchBench,
    model_folder,
    search_key,
)
from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table, median_and_range, table

PARTS = ("methods", "seeds")
BUDGETS = (20, 40, 80)
"""Plans after which searches with and without initial points are compared."""
SEARCHES = "searches.jsonl"


def main() -> None:
    """Search what is missing, summarize, save."""
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    for model in {*options.models, *(options.seed_models or ())}:
        model_folder(model, options.work)
    file = options.work / SEARCHES
    finished = read(file)
    jobs = list(dict.fromkeys(job for part in options.part for job in wanted_jobs(options, part)))
    missing = [job for job in jobs if job not in finished]
    print(f"{len(jobs)} searches, {len(jobs) - len(missing)} of them are finished", flush=True)
    for outcome in reported(search_all(missing, options.work, options.jobs), missing):
        append(file, outcome)
        finished[outcome.job] = outcome
    parts = {part: [finished[job] for job in wanted_jobs(options, part)] for part in options.part}
    CLAIM.save(summarize(parts), options, options.save)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CLAIM.parser(
        part=["methods"],
        models=["clean"],
        methods=["mean-difference", "whitened"],
        trials=3,
        seeds=1,
        work=Path("runs/direction_search-quick"),
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    add(
        "--seed-models",
        nargs="+",
        choices=list(SUBJECTS),
        help="models of the part seeds; those of --models if unset",
    )
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--trials", type=int, default=0, help="plans of a search; each model's own if 0")
    add("--seeds", type=int, default=5)
    add("--jobs", type=int, default=1, help="processes, each with a thread and a model")
    add("--work", type=Path, default=Path("runs/direction_search"), help="finished searches")
    add("--save", default="direction_search", help="name of the file under results/")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1 or options.trials < 0:
        parser.error("--seeds and --jobs must be at least 1, --trials at least 0")
    return options


def wanted_jobs(options: argparse.Namespace, part: str) -> list[SearchJob]:
    """Return the searches of a part, model by model, seed by seed."""
    jobs = []
    models = options.models if part == "methods" else options.seed_models or options.models
    for model in models:
        trials = options.trials or SUBJECTS[model].trials
        for seed in range(options.seeds):
            if part == "methods":
                jobs += [make_job(model, name, seed, trials, True) for name in options.methods]
            else:
                jobs += [make_job(model, BASE, seed, BUDGETS[-1], on) for on in (True, False)]
    return jobs


def make_job(model: str, method: str, seed: int, trials: int, seed_points: bool) -> SearchJob:
    """Return a search with the digest of everything that decides its result."""
    return SearchJob(model, method, seed, trials, seed_points, search_key(model, method))


def search_all(jobs: Sequence[SearchJob], work: Path, processes: int) -> Iterator[SearchOutcome]:
    """Yield what searches find, as they end.

    Args:
        jobs: The searches.
        work: Folder of the planted models.
        processes: Searches that run at once, each in a process of its own if more than one.
    """
    if processes == 1:
        yield from (search(job, work) for job in jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(search, job, work) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def search(job: SearchJob, work: Path) -> SearchOutcome:
    """Run one search in this process, which keeps the model for the next one."""
    return _bench(job.model, work).run(job)


@cache
def _bench(model: str, work: Path) -> SearchBench:
    return SearchBench(model, work)


def reported(
    outcomes: Iterable[SearchOutcome], jobs: Sequence[SearchJob]
) -> Iterator[SearchOutcome]:
    """Yield the outcomes, and print each with the time that the rest may take."""
    started, plans = time.perf_counter(), 0
    remaining = dict.fromkeys(jobs)
    for count, outcome in enumerate(outcomes, start=1):
        job = outcome.job
        del remaining[job]
        plans += job.trials
        seconds_a_plan = (time.perf_counter() - started) / plans
        minutes = seconds_a_plan * sum(other.trials for other in remaining) / 60
        volume = outcome.volume(REFERENCES[job.model])
        without = "" if job.seed_points else ", no initial points"
        print(
            f"[{count}/{len(jobs)}] {job.model}, {job.method}, seed {job.seed}, "
            f"{job.trials} plans{without}: {volume:.1f} %, {outcome.seconds:.0f} s; "
            f"{minutes:.0f} min left",
            flush=True,
        )
        yield outcome


def summarize(parts: dict[str, list[SearchOutcome]]) -> Figures:
    """Return the figures that the tables are made of.

    Args:
        parts: Outcomes of the searches of each part.
    """
    outcomes = list({o.job: o for found in parts.values() for o in found}.values())
    compared = parts.get("methods", [])
    return {
        "seeds": len({outcome.job.seed for outcome in outcomes}),
        "models": {
            name: {
                "reference": list(REFERENCES[name]),
                "trials": max((o.job.trials for o in compared if o.job.model == name), default=0),
                "failed": sum(o.found.count(None) for o in outcomes if o.job.model == name),
                "seconds_per_plan": seconds_per_plan([o for o in outcomes if o.job.model == name]),
            }
            for name in dict.fromkeys(outcome.job.model for outcome in outcomes)
        },
        "methods": by_method(compared, REFERENCES),
        "budgets": by_budget(parts.get("seeds", []), REFERENCES, BUDGETS),
    }


def seconds_per_plan(outcomes: Sequence[SearchOutcome]) -> float:
    """Return the seconds of a plan, the time of directions and sampler included."""
    plans = sum(outcome.job.trials for outcome in outcomes)
    return round(sum(outcome.seconds for outcome in outcomes) / plans, 3)


def methods_table(figures: Figures, models: Sequence[str]) -> list[str]:
    """Return hypervolumes by method and model, and differences to the difference of means."""
    rows = {(row["model"], row["method"]): row for row in figures["methods"]}
    models = [name for name in models if name in {model for model, _ in rows}]
    lines = []
    for method in dict.fromkeys(method for model, method in rows if model in models):
        cells = [_volume_cells(rows.get((model, method))) for model in models]
        lines.append((f"`{method}`", *(cell for pair in cells for cell in pair)))
    if not lines:
        return []
    heads = [cell for name in models for cell in (f"{name}: %", "more than the first")]
    notes = (
        f"`{name}`: {about['trials']} plans a search, measured from a rate of "
        f"{about['reference'][0]:g} and {about['reference'][1]:g} nats"
        for name, about in figures["models"].items()
        if name in models
    )
    return [*table(("method", *heads), lines), "", f"{figures['seeds']} seeds. {'; '.join(notes)}."]


def _volume_cells(row: dict[str, Any] | None) -> tuple[str, str]:
    """Return median and range of a method's volumes, and of its differences to the first method."""
    if row is None:
        return "", ""
    middle, _, ends = median_and_range(row["volume"], 1).partition(" ")
    volume = f"**{middle}** {ends}"
    if not row["against"] or row["method"] == BASE:
        return volume, ""
    return volume, _paired(row["against"])


def _paired(differences: dict[str, Any]) -> str:
    """Return median and range of paired differences, and at how many seeds there was more."""
    ends = f"{differences['min']:+.1f} to {differences['max']:+.1f}"
    count = f"{differences['more']} of {differences['seeds']}"
    return f"{differences['median']:+.1f} ({ends}), {count}"


def initial_points_table(figures: Figures) -> list[str]:
    """Return hypervolumes with and without initial points, by model and budget."""
    columns = {
        "model": lambda row: f"`{row['model']}`",
        "plans": lambda row: row["budget"],
        "with, %": lambda row: median_and_range(row["with"], 1),
        "without, %": lambda row: median_and_range(row["without"], 1),
        "more with": lambda row: _paired(row["against"]),
    }
    return column_table(columns, figures["budgets"])


CLAIM = Claim(
    "direction_search",
    "All direction methods at the same search budget; and whether a search's initial points pay.",
    "direction_search",
    {
        "direction-search": partial(methods_table, models=("clean", "outliers", "entangled")),
        "direction-search-demo": partial(methods_table, models=("demo",)),
        "seed-points": initial_points_table,
    },
)
