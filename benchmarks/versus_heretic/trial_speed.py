"""One trial here beside one trial of Heretic 1.4: same model, prompts, dtype, parameters.

    python -m benchmarks.versus_heretic.trial_speed --peer heretic [--models answers declines]
        [--dtypes bfloat16 float32] [--trials 12] [--trials-per-pass 1 4] [--check] [--study 40]

Both run as processes of their own with equal threads, in turns: ours, the peer, ours, …; who does
not run sleeps. Ours may also put several trials into one pass. Then every technique of ours is
switched off by itself, in turns with all on, and the machine's rates give the floor of a trial.
See docs/performance.md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import floor
from benchmarks.harness import statistics as summary
from benchmarks.harness.record import save
from benchmarks.harness.worker_process import Worker
from benchmarks.versus_heretic import environment as peer_env
from benchmarks.versus_heretic import shared_plans as points
from ray_abliterate.search.plan import ModelShape, Plan

SETTLE_SECONDS = 0.3
"""Pause before each measurement: threads of the other process stop spinning."""
PREFILL_ROWS = 2048
SWITCH_ROUNDS = 5
WARM_UP_SEED = 1000
CHECK_POINTS = 4
EVERYTHING = "all of them"


def main() -> None:
    """Measure, print, save."""
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="trial-") as scratch:
        bench = Bench(options, peer_env.ensure(options.peer_env), Path(scratch))
        figures = trials(bench) if options.trials else {"configurations": []}
        if options.study:
            from benchmarks.versus_heretic import whole_study as study

            found = study.compare(bench, *options.study_on.split(":"))
            print(save("trial", {**about(bench), "study": found}, f"{options.save}-study"))
    report(figures)


def trials(bench: "Bench") -> dict[str, Any]:
    """All configurations, saved after each."""
    options = bench.options
    figures: dict[str, Any] = {**about(bench), "configurations": []}
    if options.check:
        figures["check"] = [check(bench, model) for model in options.models]
    for model in options.models:
        for dtype in options.dtypes:
            figures["configurations"].append(measure(bench, model, dtype))
            print(save("trial", figures, options.save))
    return figures


def about(bench: "Bench") -> dict[str, Any]:
    """What every file of a run says about it."""
    settings = {k: v for k, v in vars(bench.options).items() if not isinstance(v, Path)}
    return {"settings": settings, "peer": peer_env.versions(bench.peer_python)}


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peer", choices=["heretic"], default="heretic")
    add("--peer-env", type=Path, default=peer_env.DEFAULT, help="its environment; made if absent")
    add("--models", nargs="+", default=["answers", "declines"], help="these, or folders")
    add("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    add("--prompts", type=int, default=64, help="of each of the two scored sets")
    add("--direction-prompts", type=int, default=128, help="of each of the two sets extracted from")
    add("--tokens", type=int, default=40, help="of an answer")
    add("--trials", type=int, default=12, help="points per model and dtype; 0: no trials")
    add("--trials-per-pass", type=int, nargs="+", default=[1, 4])
    add("--batch-size", type=int, default=64, help="of both; 0: the peer searches, ours follows")
    add("--start-up", action="store_true", help="the peer also looks for a response prefix")
    add("--norm", choices=list(points.NORMALISATION), default="row")
    add("--ablation", type=int, default=3, help="rounds with each technique off; 0: none")
    add("--ablation-per-pass", type=int, nargs="+", default=[1])
    add("--check", action="store_true", help="first: equal KL divergences in float32, norm none")
    add("--study", type=int, default=0, help="whole studies of so many trials; 0: none")
    add("--study-on", default="declines:bfloat16", help="model:dtype of the studies")
    add("--threads", type=int, default=0, help="of each process; 0: all cores")
    add("--seed", type=int, default=0, help="of the points")
    add("--save", default="trial", help="name of the file under results/")
    options = parser.parse_args()
    uneven = [k for k in options.trials_per_pass if options.trials % k]
    known = {"answers", "declines"}
    absent = [m for m in options.models if m not in known and not Path(m).is_dir()]
    if absent:
        parser.error(f"--models {absent[0]}: neither answers nor declines, nor a folder")
    if uneven:
        parser.error(f"--trials {options.trials} is no multiple of --trials-per-pass {uneven[0]}")
    return options


class Bench:
    """What all configurations share: options, prompts as lists and files, model folders."""

    def __init__(self, options: argparse.Namespace, peer_python: Path, folder: Path) -> None:
        from benchmarks.harness.record import cores

        self.options, self.peer_python, self.folder = options, peer_python, folder
        self.threads = options.threads or cores()
        self.prompts = prompts(options.prompts, options.direction_prompts)
        self.files = {name: folder / f"{name}.txt" for name in self.prompts}
        for name, users in self.prompts.items():
            self.files[name].write_text("\n".join(users) + "\n", encoding="utf-8")
        studied = [options.study_on.partition(":")[0]] if options.study else []
        self.models = {name: model_folder(name) for name in {*options.models, *studied}}

    def peer_settings(self, model: str, dtype: str, norm: str) -> dict[str, Any]:
        """Settings of the release; prompt sets as text files."""
        from benchmarks.versus_heretic.our_worker import KL, RATE

        sets = {
            "good_prompts": "neutral",
            "bad_prompts": "behaviour",
            "good_evaluation_prompts": KL,
            "bad_evaluation_prompts": RATE,
        }
        return {
            "model": str(self.models[model]),
            "dtypes": [dtype],
            "batch_size": self.options.batch_size,
            "max_response_length": self.options.tokens,
            "response_prefix": None if self.options.start_up else "",
            "row_normalization": points.NORMALISATION[norm],
            **{name: {"dataset": str(self.files[ours])} for name, ours in sets.items()},
        }

    def our_recipe(self, model: str, dtype: str, norm: str, peer: dict[str, Any]) -> dict[str, Any]:
        """The same job as a recipe's values; prompt sets as the same text files.

        `peer` has the peer's `markers`, `system_prompt` and `batch_size`.
        """
        from benchmarks.versus_heretic.our_worker import KL, RATE

        system = peer["system_prompt"]
        source = {n: {"file": str(file), "system": system} for n, file in self.files.items()}
        rate = {"kind": RATE, "prompts": source[RATE], "markers": peer["markers"]}
        return {
            "model": {"name": str(self.models[model]), "dtype": dtype},
            "prompts": {"behaviour": source["behaviour"], "neutral": source["neutral"]},
            "edit": {"norm": norm},
            "scorers": [
                {"kind": KL, "prompts": source[KL], "tokens": 1},
                {**rate, "max_new_tokens": self.options.tokens},
            ],
            "run": {"batch_size": peer["batch_size"]},
        }


def prompts(scored: int, extracted: int) -> dict[str, list[str]]:
    """The demo's prompt sets: two scored (held out), two that directions come from."""
    from benchmarks.versus_heretic.our_worker import KL, RATE
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.recipe import PromptSource

    wanted = {
        KL: ("other-heldout", scored),
        RATE: ("cooking-heldout", scored),
        "behaviour": ("cooking-train", extracted),
        "neutral": ("other-train", extracted),
    }
    return {
        name: [
            " ".join(prompt.user.split())
            for prompt in load_prompt_set(
                name, PromptSource(builtin=builtin, split=f"[:{count}]"), Path()
            ).prompts
        ]
        for name, (builtin, count) in wanted.items()
    }


def model_folder(name: str) -> Path:
    """The folder of a model, built if need be by a process that then gives its memory back."""
    from ray_abliterate.data.builtin import demo_model as demo

    if name not in ("answers", "declines"):
        return Path(name)
    if name == "declines":
        folder, build = demo.default_folder(), "build_demo_model"
    else:
        folder, build = demo.base_folder(), "build_base_model"
    program = (
        "import sys, pathlib; from ray_abliterate.data.builtin import demo_model; "
        f"demo_model.{build}"
    )
    command = f"{program}(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", command, folder], check=True)
    return folder


class Pair:
    """The peer and, by trials per pass, our processes, loaded for one model and dtype."""

    def __init__(
        self, bench: Bench, model: str, dtype: str, norm: str, per_pass: list[int]
    ) -> None:
        self.name = f"{Path(model).name} {dtype}"
        self.bench, self.ours, self.our_facts = bench, {}, {}
        self._stack = ExitStack()
        try:
            self._load(model, dtype, norm, per_pass)
        except BaseException:
            self._stack.close()
            raise

    def _load(self, model: str, dtype: str, norm: str, per_pass: list[int]) -> None:
        bench = self.bench
        self.peer = self._worker(bench.peer_python, "benchmarks.versus_heretic.heretic_worker")
        settings = bench.peer_settings(model, dtype, norm)
        self.peer_facts = self.peer.call("load", settings=settings, threads=bench.threads)
        recipe = bench.our_recipe(model, dtype, norm, self.peer_facts)
        found = bench.folder / f"{Path(model).name}-{dtype}-{norm}.safetensors"
        arguments = {
            "recipe": recipe,
            "prompts": bench.prompts,
            "system": self.peer_facts["system_prompt"],
            "threads": bench.threads,
            "directions": str(found),
        }
        together = True
        for count in sorted(per_pass):
            if count > 1 and not together:
                print(f"{self.name}: a replica evaluates one plan at a time; {count} skipped")
                continue
            self.ours[count] = self._worker(
                Path(sys.executable), "benchmarks.versus_heretic.our_worker"
            )
            self.our_facts[count] = self.ours[count].call("load", **arguments)
            together = self.our_facts[count]["evaluates_together"]
        self.cosines = self.peer.call("directions", path=str(found))["cosines"]
        self.shape = shape_of(next(iter(self.our_facts.values())), self.peer_facts)

    def _worker(self, python: Path, module: str) -> Worker:
        return self._stack.enter_context(
            Worker(python, module, self.bench.folder, self.bench.threads)
        )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def shape_of(ours: dict[str, Any], peer: dict[str, Any]) -> ModelShape:
    """The shape that both sides see.

    Raises:
        ValueError: they see different layers, components, dtypes or threads.
    """
    mapped = sorted(points.COMPONENTS[c] for c in ours["components"])
    facts = [
        ("layers", ours["layers"], peer["layers"]),
        ("components", mapped, sorted(peer["components"])),
        ("dtype", ours["dtype"], peer["dtype"]),
        ("threads", ours["threads"], peer["threads"]),
    ]
    for name, a, b in facts:
        if a != b:
            raise ValueError(f"the two sides differ in {name}: {a} here, {b} there")
    return ModelShape(ours["layers"], ours["hidden"], tuple(ours["components"]))


def in_turns(pair: Pair, plans: list[Plan]) -> tuple[dict[int, list[Any]], list[Any]]:
    """Our passes by trials per pass, and the peer's trials, each after a pause."""
    ours: dict[int, list[Any]] = {count: [] for count in pair.ours}
    peer = []
    for index, plan in enumerate(plans):
        for count, worker in pair.ours.items():
            if index % count == 0:
                some = [p.to_json() for p in plans[index : index + count]]
                ours[count].append(settled(worker, "trial", plans=some))
        peer.append(settled(pair.peer, "trial", **points.to_peer(plan)))
        print(f"{pair.name}: {index + 1}/{len(plans)}", file=sys.stderr)
    return ours, peer


def settled(worker: Worker, command: str, **arguments: Any) -> dict[str, Any]:
    """Call after a pause."""
    time.sleep(SETTLE_SECONDS)
    return worker.call(command, **arguments)


def warm_up(pair: Pair, norm: Any) -> None:
    """One pass of each process that is not counted: memory is touched, products are known."""
    for count, worker in pair.ours.items():
        plans = points.draw(pair.shape, norm, count, WARM_UP_SEED)
        worker.call("trial", plans=[plan.to_json() for plan in plans])
    plan = points.draw(pair.shape, norm, 1, WARM_UP_SEED)[0]
    pair.peer.call("trial", **points.to_peer(plan))


def check(bench: Bench, model: str) -> dict[str, Any]:
    """The two measure the same: KL divergences agree in float32 without normalisation.

    Raises:
        SystemExit: they don't, at some point.
    """
    options = bench.options
    together = math.lcm(*options.trials_per_pass)
    count = min(options.trials, together * math.ceil(CHECK_POINTS / together))
    with Pair(bench, model, "float32", "none", options.trials_per_pass) as pair:
        plans = points.draw(pair.shape, "none", count, options.seed)
        found = trials_of(plans, *in_turns(pair, plans))
    for row in found:
        for count, ours in row["ours"].items():
            kl, peer = ours["kl"], row["peer"]["kl"]
            print(f"check {model}, {count} a pass: KL {kl:.6f} here, {peer:.6f} there")
            if not summary.same_kl(kl, peer):
                raise SystemExit(f"{model}: the KL divergences differ; the comparison is not fair")
    return {
        "model": Path(model).name,
        "dtype": "float32",
        "norm": "none",
        "trials": found,
        "agreement": agreement(found),
    }


def measure(bench: Bench, model: str, dtype: str) -> dict[str, Any]:
    """Everything about one model in one dtype."""
    options = bench.options
    with Pair(bench, model, dtype, options.norm, options.trials_per_pass) as pair:
        warm_up(pair, options.norm)
        plans = points.draw(pair.shape, options.norm, options.trials, options.seed)
        ours, peer = in_turns(pair, plans)
        per_pass = {
            count: summary.compare(
                [p["seconds"] for p in ours[count]], [t["seconds"] for t in peer], count
            )
            | {"ours_peak_bytes": ours[count][-1]["peak_bytes"]}
            for count in ours
        }
        found = trials_of(plans, ours, peer)
        return {
            "model": Path(model).name,
            "dtype": dtype,
            "norm": options.norm,
            "per_pass": per_pass,
            "peer_peak_bytes": peer[-1]["peak_bytes"],
            "agreement": agreement(found),
            "trials": found,
            "directions_cosines": pair.cosines,
            "start_up": start_up(pair),
            "switch": switching(pair, plans, per_pass),
            "floor": floors(pair, ours, per_pass),
            "techniques": techniques(pair, plans),
        }


def compact(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial for the file: a digit per verdict, the tokens of all answers together."""
    kept = dict(trial)
    if kept["verdicts"] is not None:
        kept["verdicts"] = "".join(map(str, kept["verdicts"]))
    if kept.get("answer_tokens"):
        kept["answer_tokens"] = sum(kept["answer_tokens"])
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in kept.items()}


def trials_of(
    plans: list[Plan], ours: dict[int, list[Any]], peer: list[Any]
) -> list[dict[str, Any]]:
    """One row a point: the plan, and what each side found."""
    flat = {count: [t for p in passes for t in p["trials"]] for count, passes in ours.items()}
    return [
        {
            "plan": plan.to_params() | {"norm": plan.norm},
            "ours": {count: compact(trials[index]) for count, trials in flat.items()},
            "peer": compact({k: v for k, v in peer[index].items() if k != "peak_bytes"}),
        }
        for index, plan in enumerate(plans)
    ]


def agreement(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts and KL divergences of both sides, by trials per pass."""
    rows: dict[str, Any] = {}
    for count in found[0]["ours"]:
        pairs = [(row["ours"][count], row["peer"]) for row in found]
        known = [(a["verdicts"], b["verdicts"]) for a, b in pairs if a["verdicts"] is not None]
        gaps = [abs(a["kl"] - b["kl"]) / max(b["kl"], 1e-9) for a, b in pairs]
        rows[count] = {
            "verdicts": summary.agreement(*zip(*known, strict=True)) if known else None,
            "refusals_ours": [a["refusals"] for a, _ in pairs],
            "refusals_peer": [b["refusals"] for _, b in pairs],
            "kl_relative_difference": summary.spread(gaps),
        }
    return rows


def start_up(pair: Pair) -> dict[str, Any]:
    """Seconds of each part on both sides, and what they began with."""
    ours = next(iter(pair.our_facts.values()))
    return {
        "ours_seconds": ours["seconds"],
        "peer_seconds": pair.peer_facts["seconds"],
        "batch_size": pair.peer_facts["batch_size"],
        "base_refusals": {"ours": ours["base_refusals"], "peer": pair.peer_facts["base_refusals"]},
    }


def switching(pair: Pair, plans: list[Plan], per_pass: dict[int, Any]) -> dict[str, Any] | None:
    """What applying and undoing plans costs, as a share of a single trial."""
    if 1 not in pair.ours:
        return None
    rounds = [
        pair.ours[1].call("switch", plan=plan.to_json(), rounds=SWITCH_ROUNDS) for plan in plans
    ]
    apply, restore = ([s for r in rounds for s in r[part]] for part in ("apply", "restore"))
    total = statistics.median(apply) + statistics.median(restore)
    trial = per_pass[1]["ours_seconds"]["median"]
    return {
        "apply_seconds": summary.spread(apply),
        "restore_seconds": summary.spread(restore),
        "percent_of_trial": round(100 * total / trial, 2),
    }


def floors(pair: Pair, ours: dict[int, list[Any]], per_pass: dict[int, Any]) -> dict[str, Any]:
    """The floor by trials per pass: of whole answers, and of the tokens that were written."""
    options, worker = pair.bench.options, next(iter(pair.ours.values()))
    facts = next(iter(pair.our_facts.values()))
    rows = [options.prompts * count for count in pair.ours]
    machine = worker.call("machine", rows=sorted({*rows, PREFILL_ROWS}))
    rates = {int(n): rate for n, rate in machine["flop_per_s"].items()}
    steps = options.tokens - 1
    decoded = {"whole answers": (options.prompts * steps, steps)}
    if 1 in ours:
        written = [p["trials"][0]["answer_tokens"] for p in ours[1]]
        fed = round(statistics.mean(sum(n - 1 for n in t if n) for t in written))
        decoded["tokens written"] = (fed, max(max(t) for t in written) - 1)
    kept = ("prefill_tokens", "linear_parameters", "head_parameters", "bytes_per_parameter")
    sizes = {name: facts[name] for name in kept}
    found: dict[str, Any] = {"work": {**sizes, "prompts": 2 * options.prompts}}
    for count in pair.ours:
        found[str(count)] = {}
        for name, (tokens, longest) in decoded.items():
            work = floor.Work(
                prompts=2 * options.prompts,
                decode_tokens=tokens,
                decode_steps=longest,
                trials=count,
                **sizes,
            )
            least = floor.summary(work, rates, machine["bytes_per_s"])
            trial = per_pass[count]["ours_seconds"]["median"]
            distance = round(trial / least["floor_seconds"], 2)
            found[str(count)][name] = least | {"ours_over_floor": distance}
    return found


def techniques(pair: Pair, plans: list[Plan]) -> dict[str, Any] | None:
    """How many times longer a pass takes with each technique off, by trials per pass."""
    options = pair.bench.options
    names = next(iter(pair.our_facts.values()))["techniques"]
    if not options.ablation:
        return None
    without = {name: [name] for name in names} | {EVERYTHING: list(names)}
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
    """Passes with all techniques on, and between them one with each switched off.

    What each round finds is held against the mean of its own two passes with all on. One round
    before the first is not counted: a technique switched back on may have to learn again.
    """

    def seconds(off: list[str]) -> float:
        return float(settled(worker, "trial", plans=plans, off=off)["seconds"])

    found: dict[str, list[float]] = {name: [] for name in without}
    all_on = []
    for counted in [False, *[True] * rounds]:
        before = seconds([])
        row = {name: seconds(off) for name, off in without.items()}
        on = statistics.mean([before, seconds([])])
        if counted:
            all_on.append(on)
            for name, value in row.items():
                found[name].append(value / on)
    return {
        name: {
            "slowdown": round(statistics.median(ratios), 3),
            "range": summary.spread(ratios, 3),
            "on_seconds": summary.spread(all_on),
        }
        for name, ratios in found.items()
    }


def report(figures: dict[str, Any]) -> None:
    """Print the tables of docs/performance.md for these figures, and the three last lines."""
    from benchmarks.harness.tables import overview, technique_table

    figures = json.loads(json.dumps(figures))
    print("\n".join(["", *overview(figures), "", *technique_table(figures), ""]))
    print("\n".join(summary.verdict_lines(figures["configurations"])))


if __name__ == "__main__":
    main()
