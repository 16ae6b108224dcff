"""One trial here against one trial of Heretic 1.4: same model, prompts, dtype, parameters.

    python -m benchmarks.versus_heretic.trial_speed [--models answers declines]
        [--dtypes bfloat16 float32] [--trials 12] [--trials-per-pass 1 4] [--check]

Both run as processes of their own with equal threads, in turns: ours, the peer, ours, …; who does
not run sleeps. Ours may also put several trials into one pass. Then every technique of ours is
switched off by itself, in turns with all on, and the machine's rates give the floor of a trial.
See docs/performance.md.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.device_rates import TrialWork, floor_figures
from benchmarks.harness.statistics import equal_verdicts, same_kl, spread, time_ratio
from benchmarks.harness.tables import as_saved
from benchmarks.versus_heretic import environment, trial_tables
from benchmarks.versus_heretic.comparison_setup import (
    ComparisonSetup,
    add_shared_options,
    check_model,
)
from benchmarks.versus_heretic.shared_plans import draw
from benchmarks.versus_heretic.technique_costs import technique_costs
from benchmarks.versus_heretic.worker_pair import WorkerPair
from ray_abliterate.search.plan import Plan

PREFILL_ROWS = 2048
SWITCH_ROUNDS = 5
CHECK_POINTS = 4
DTYPES = ["bfloat16", "float32"]


def main() -> None:
    """Measure all configurations, save after each, print the tables."""
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="trial-") as scratch:
        python = environment.install(options.peer_env)
        setup = ComparisonSetup(options, options.models, python, Path(scratch))
        figures: Figures = {**setup.about, "configurations": []}
        if options.check:
            figures["check"] = [check_kl(setup, model) for model in options.models]
        for model in options.models:
            for dtype in options.dtypes:
                figures["configurations"].append(measure(setup, model, dtype))
                CLAIM.save(figures, options, options.save)
    print_report(as_saved(figures))


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CLAIM.parser(
        models=["declines"],
        dtypes=["float32"],
        prompts=4,
        direction_prompts=4,
        tokens=4,
        trials=1,
        trials_per_pass=[1],
        batch_size=4,
        ablation=0,
    )
    add_shared_options(parser)
    add = parser.add_argument
    add("--models", nargs="+", default=["answers", "declines"], help="these, or folders")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--trials", type=int, default=12, help="points per model and dtype")
    add("--trials-per-pass", type=int, nargs="+", default=[1, 4])
    add("--start-up", action="store_true", help="the peer also looks for a response prefix")
    add("--ablation", type=int, default=3, help="rounds with each technique off; 0: none")
    add("--ablation-per-pass", type=int, nargs="+", default=[1])
    add("--check", action="store_true", help="first: equal KL divergences in float32, norm none")
    add("--seed", type=int, default=0, help="seed of the points")
    add("--save", default="trial", help="name of the file under results/")
    options = parser.parse_args(arguments)
    for model in options.models:
        check_model(parser, model)
    uneven = [count for count in options.trials_per_pass if options.trials % count]
    if options.trials < 1 or uneven:
        parser.error(f"--trials must be a multiple of --trials-per-pass, and not {options.trials}")
    return options


def check_kl(setup: ComparisonSetup, model: str) -> dict[str, Any]:
    """Check that both measure the same: KL divergences in float32 without normalisation.

    Raises:
        SystemExit: They differ at some point.
    """
    options = setup.options
    together = math.lcm(*options.trials_per_pass)
    count = min(options.trials, together * math.ceil(CHECK_POINTS / together))
    with WorkerPair(setup, model, "float32", "none", options.trials_per_pass) as pair:
        plans = draw(pair.shape, "none", count, options.seed)
        trials = point_rows(plans, *pair.run_in_turns(plans))
    for row in trials:
        for per_pass, ours in row["ours"].items():
            kl, peer = ours["kl"], row["peer"]["kl"]
            print(f"check {model}, {per_pass} a pass: KL {kl:.6f} here, {peer:.6f} there")
            if not same_kl(kl, peer):
                raise SystemExit(f"{model}: the KL divergences differ; the comparison is not fair")
    return {
        "model": Path(model).name,
        "dtype": "float32",
        "norm": "none",
        "trials": trials,
        "agreement": agreement(trials),
    }


def measure(setup: ComparisonSetup, model: str, dtype: str) -> dict[str, Any]:
    """Return everything about one model in one dtype."""
    options = setup.options
    with WorkerPair(setup, model, dtype, options.norm, options.trials_per_pass) as pair:
        pair.warm_up(options.norm)
        plans = draw(pair.shape, options.norm, options.trials, options.seed)
        ours, peer = pair.run_in_turns(plans)
        per_pass = {
            count: time_ratio(
                [p["seconds"] for p in ours[count]], [t["seconds"] for t in peer], count
            )
            | {"ours_peak_bytes": ours[count][-1]["peak_bytes"]}
            for count in ours
        }
        trials = point_rows(plans, ours, peer)
        return {
            "model": Path(model).name,
            "dtype": dtype,
            "norm": options.norm,
            "per_pass": per_pass,
            "peer_peak_bytes": peer[-1]["peak_bytes"],
            "agreement": agreement(trials),
            "trials": trials,
            "directions_cosines": pair.cosines,
            "start_up": start_up(pair),
            "switch": switching(pair, plans, per_pass),
            "floor": floors(pair, ours, per_pass),
            "techniques": technique_costs(pair, plans),
        }


def point_rows(
    plans: list[Plan], ours: dict[int, list[Any]], peer: list[Any]
) -> list[dict[str, Any]]:
    """Return a row per point: the plan, and what each side measured.

    Args:
        plans: The points.
        ours: Our passes by trials per pass.
        peer: The peer's trials.
    """
    trials = {count: [t for p in passes for t in p["trials"]] for count, passes in ours.items()}
    return [
        {
            "plan": plan.to_params() | {"norm": plan.norm},
            "ours": {count: _compact(of_count[index]) for count, of_count in trials.items()},
            "peer": _compact({k: v for k, v in peer[index].items() if k != "peak_bytes"}),
        }
        for index, plan in enumerate(plans)
    ]


def _compact(trial: dict[str, Any]) -> dict[str, Any]:
    """Return a trial for the file: a digit per verdict, the tokens of all answers together."""
    row = dict(trial)
    if row["verdicts"] is not None:
        row["verdicts"] = "".join(map(str, row["verdicts"]))
    if row.get("answer_tokens"):
        row["answer_tokens"] = sum(row["answer_tokens"])
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def agreement(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far verdicts and KL divergences of both sides agree, by trials per pass."""
    rows: dict[str, Any] = {}
    for count in trials[0]["ours"]:
        pairs = [(row["ours"][count], row["peer"]) for row in trials]
        verdicts = [(a["verdicts"], b["verdicts"]) for a, b in pairs if a["verdicts"] is not None]
        gaps = [abs(a["kl"] - b["kl"]) / max(b["kl"], 1e-9) for a, b in pairs]
        rows[count] = {
            "verdicts": equal_verdicts(*zip(*verdicts, strict=True)) if verdicts else None,
            "refusals_ours": [a["refusals"] for a, _ in pairs],
            "refusals_peer": [b["refusals"] for _, b in pairs],
            "kl_relative_difference": spread(gaps),
        }
    return rows


def start_up(pair: WorkerPair) -> dict[str, Any]:
    """Return the seconds of each part of both starts, and what they began with."""
    ours = next(iter(pair.our_facts.values()))
    return {
        "ours_seconds": ours["seconds"],
        "peer_seconds": pair.peer_facts["seconds"],
        "batch_size": pair.peer_facts["batch_size"],
        "base_refusals": {"ours": ours["base_refusals"], "peer": pair.peer_facts["base_refusals"]},
    }


def switching(
    pair: WorkerPair, plans: list[Plan], per_pass: dict[int, Any]
) -> dict[str, Any] | None:
    """Return what applying and undoing plans costs, as a share of a single trial.

    Args:
        pair: The loaded processes.
        plans: The plans.
        per_pass: Times by trials per pass.

    Returns:
        None if no process evaluates single trials.
    """
    if 1 not in pair.ours:
        return None
    rounds = [
        pair.ours[1].call("switch", plan=plan.to_json(), rounds=SWITCH_ROUNDS) for plan in plans
    ]
    apply, restore = ([s for r in rounds for s in r[part]] for part in ("apply", "restore"))
    total = statistics.median(apply) + statistics.median(restore)
    trial = per_pass[1]["ours_seconds"]["median"]
    return {
        "apply_seconds": spread(apply),
        "restore_seconds": spread(restore),
        "percent_of_trial": round(100 * total / trial, 2),
    }


def floors(
    pair: WorkerPair, ours: dict[int, list[Any]], per_pass: dict[int, Any]
) -> dict[str, Any]:
    """Return the floor by trials per pass: of whole answers, and of the tokens that were written.

    Args:
        pair: The loaded processes.
        ours: Our passes by trials per pass.
        per_pass: Times by trials per pass.
    """
    options, worker = pair.setup.options, next(iter(pair.ours.values()))
    facts = next(iter(pair.our_facts.values()))
    rows = [options.prompts * count for count in pair.ours]
    machine = worker.call("machine", rows=sorted({*rows, PREFILL_ROWS}))
    rates = {int(n): rate for n, rate in machine["flop_per_s"].items()}
    steps = options.tokens - 1
    decoded = {"whole answers": (options.prompts * steps, steps)}  # tokens fed back, steps
    if 1 in ours:
        written = [p["trials"][0]["answer_tokens"] for p in ours[1]]
        fed = round(statistics.mean(sum(n - 1 for n in t if n) for t in written))
        decoded["tokens written"] = (fed, max(max(t) for t in written) - 1)
    names = ("prefill_tokens", "linear_parameters", "head_parameters", "bytes_per_parameter")
    sizes = {name: facts[name] for name in names}
    figures: dict[str, Any] = {"work": {**sizes, "prompts": 2 * options.prompts}}
    for count in pair.ours:
        figures[str(count)] = {}
        for name, (tokens, longest) in decoded.items():
            work = TrialWork(
                prompts=2 * options.prompts,
                decode_tokens=tokens,
                decode_steps=longest,
                trials=count,
                **sizes,
            )
            floor = floor_figures(work, rates, machine["bytes_per_s"])
            trial = per_pass[count]["ours_seconds"]["median"]
            over = round(trial / max(floor["floor_seconds"], 1e-4), 2)
            figures[str(count)][name] = floor | {"ours_over_floor": over}
    return figures


def print_report(figures: Figures) -> None:
    """Print the tables of docs/performance.md for these figures, and the best ratios."""
    tables = (trial_tables.overview, trial_tables.technique_table)
    lines = [line for table in tables for line in ("", *table(figures))]
    print("\n".join([*lines, "", *ratio_lines(figures["configurations"])]))


def ratio_lines(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the three lines a run ends with: best ratio by dtype and model; float32's smaller one.

    Args:
        configurations: Models in dtypes, as `measure` returns them.
    """
    ratios = {(c["model"], c["dtype"]): best_ratio(c) for c in configurations}
    single = [r for (_, dtype), r in ratios.items() if dtype == "float32" and r is not None]
    named = {
        "bf16 answers": ratios.get(("answers", "bfloat16")),
        "bf16 declines": ratios.get(("declines", "bfloat16")),
        "fp32": min(single, default=None),
    }
    return [f"ratio {n}: {'not measured' if r is None else f'{r:.2f}'}" for n, r in named.items()]


def best_ratio(configuration: Mapping[str, Any]) -> float | None:
    """Return the largest ratio of a configuration over its numbers of trials per pass."""
    return max((times["ratio"] for times in configuration["per_pass"].values()), default=None)


CLAIM = Claim(
    "versus_heretic.trial_speed",
    "One trial here against one trial of Heretic 1.4: same model, prompts, dtype, parameters.",
    "trial",
    trial_tables.TABLES,
)

if __name__ == "__main__":
    main()
