"""The tables of pages under docs/, made from the files under `results/`.

    python -m benchmarks.harness.tables

Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of the pages is
written by hand.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGES = tuple(
    DOCS / f"{name}.md" for name in ("performance", "reliability", "evaluation", "directions")
)
RESULTS = Path(__file__).parents[1] / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MOVED = {
    "components": "component_directions",
    "decode": "decode_step",
    "direction_models": "direction_search.models",
    "direction_search": "direction_search",
    "dominance": "dominance_stop",
    "efficiency": "search_scaling.budget_efficiency",
    "evaluation_pool": "evaluation_pool",
    "export": "export_memory",
    "faults": "fault_recovery",
    "floor": "harness.floor",
    "folds": "fold_count",
    "heretic_peer": "versus_heretic.heretic_worker",
    "methods": "direction_method_cost",
    "node_memory": "shared_weights_memory",
    "our_trial": "versus_heretic.our_worker",
    "overhead": "search_overhead",
    "peer_env": "versus_heretic.environment",
    "points": "versus_heretic.shared_plans",
    "protocol": "harness.worker_process",
    "quantized": "quantized_scores",
    "rates": "harness.rates",
    "sampler_time": "search_scaling.sampler_time",
    "scaling": "search_scaling",
    "seeing": "residual_pages",
    "statistics": "residual_statistics",
    "streaming": "streaming_evaluation",
    "study": "versus_heretic.whole_study",
    "summary": "harness.statistics",
    "surrogate": "harness.recorded_study",
    "tables": "harness.tables",
    "throughput": "search_scaling.throughput",
    "trial": "versus_heretic.trial_speed",
    "volumes": "direction_search.hypervolumes",
    "weight_cache": "weight_cache",
}
"""Where benchmarks are now, by the name in older files of results."""
ABSENT = ["Not measured yet."]
GB = 1e9

Row = Sequence[object]


def main() -> None:
    """Write the pages anew."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)


def render(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made from the files in `results`.

    Raises:
        KeyError: a block of the page has a name that is not in `TABLES`.
    """
    return BLOCK.sub(lambda match: _block(match, results), page)


def _block(match: re.Match[str], results: Path) -> str:
    source, make = TABLES[match["name"]]
    file = results / f"{source}.json"
    lines = ABSENT
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        found = make(record["figures"])
        lines = [*found, "", *origin(record)] if found else ABSENT
    return "\n".join([match[1].rstrip(), *lines, match[3]])


def origin(record: dict[str, Any]) -> list[str]:
    """What produced a table, in a line."""
    machine, versions = record["machine"], record["versions"]
    units = machine.get("matrix_units")
    cpu = machine["cpu"] + (f" with {', '.join(units)}" if units else "")
    return [
        f"`{_renamed(record['command'])}`, {record['date']}, {machine['cores']} cores, {cpu}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    ]


def _renamed(command: str) -> str:
    """A command as it is given today; files under `results/` keep the one they were made with."""
    old = re.match(r"python -m benchmarks\.(\w+)(?![\w.])", command)
    return command if old is None else f"python -m benchmarks.{MOVED[old[1]]}{command[old.end() :]}"


def table(head: Row, rows: Sequence[Row]) -> list[str]:
    """A Markdown table; nothing without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def column_table(
    columns: dict[str, Callable[[Any], str]], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """A table of what each column, under its head, says of a row."""
    return table(tuple(columns), [[cell(row) for cell in columns.values()] for row in rows])


def configured(figures: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Each configuration with each of its numbers of trials per pass."""
    return [(c, count) for c in figures["configurations"] for count in c["per_pass"]]


def overview(figures: dict[str, Any]) -> list[str]:
    """Seconds per trial, ratio and memory."""
    head = (
        "model",
        "dtype",
        "trials a pass",
        "here, s a trial",
        "Heretic, s a trial",
        "ratio",
        "paired ratios",
        "peak memory here, Heretic",
    )
    rows = []
    for found, count in configured(figures):
        each = found["per_pass"][count]
        paired = each["paired"]
        rows.append(
            (
                found["model"],
                found["dtype"],
                count,
                spread(each["ours_seconds"]),
                spread(each["peer_seconds"]),
                f"**{each['ratio']:.2f}**",
                f"{paired['min']:.2f} to {paired['max']:.2f}",
                f"{each['ours_peak_bytes'] / GB:.2f}, {found['peer_peak_bytes'] / GB:.2f} GB",
            )
        )
    return table(head, rows)


def spread(values: dict[str, float]) -> str:
    """Median, and the range behind it."""
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def agreement_table(figures: dict[str, Any]) -> list[str]:
    """Whether both found the same."""
    head = (
        "model",
        "dtype",
        "trials a pass",
        "equal verdicts",
        "refusals here, Heretic",
        "relative difference of KL",
    )
    rows = []
    for found, count in configured(figures):
        each = found["agreement"][count]
        verdicts = each["verdicts"]
        rows.append(
            (
                found["model"],
                found["dtype"],
                count,
                f"{verdicts['equal']} of {verdicts['verdicts']}" if verdicts else "by count",
                f"{sum(each['refusals_ours'])}, {sum(each['refusals_peer'])}",
                percent(each["kl_relative_difference"]),
            )
        )
    return table(head, rows)


def percent(values: dict[str, float]) -> str:
    """Median of shares, and the largest, in percent."""
    return f"{100 * values['median']:.1f} %, at most {100 * values['max']:.1f} %"


def check_table(figures: dict[str, Any]) -> list[str]:
    """KL divergences with normalisation off: the largest difference over all points."""
    rows = []
    for found in figures.get("check", []):
        for count, each in found["agreement"].items():
            pairs = [(row["ours"][count]["kl"], row["peer"]["kl"]) for row in found["trials"]]
            verdicts = each["verdicts"]
            rows.append(
                (
                    found["model"],
                    count,
                    len(pairs),
                    f"{min(b for _, b in pairs):.4f} to {max(b for _, b in pairs):.4f}",
                    f"{max(abs(a - b) for a, b in pairs):.6f}",
                    f"{verdicts['equal']} of {verdicts['verdicts']}" if verdicts else "by count",
                    f"{sum(each['refusals_ours'])}, {sum(each['refusals_peer'])}",
                )
            )
    head = (
        "model",
        "trials a pass",
        "points",
        "KL of Heretic",
        "largest difference",
        "equal verdicts",
        "refusals here, Heretic",
    )
    return table(head, rows)


def floor_table(figures: dict[str, Any]) -> list[str]:
    """Floors, and how far from them a trial is."""
    head = (
        "model",
        "dtype",
        "trials a pass",
        "rows a step",
        "GFLOP a trial",
        "GFLOP/s prefill, step",
        "floor, s",
        "here over floor",
        "here over floor of the tokens written",
    )
    rows = []
    for found, count in configured(figures):
        floors = found["floor"][count]
        whole, written = floors["whole answers"], floors.get("tokens written")
        rows.append(
            (
                found["model"],
                found["dtype"],
                count,
                whole["decode_rows"],
                f"{whole['flop_per_trial'] / 1e9:.0f}",
                f"{whole['prefill_gflop_per_s']:.0f}, {whole['decode_gflop_per_s']:.0f}",
                f"{whole['floor_seconds']:.2f}",
                f"{whole['ours_over_floor']:.2f}",
                f"{written['ours_over_floor']:.2f}" if written else "",
            )
        )
    return table(head, rows)


def technique_table(figures: dict[str, Any]) -> list[str]:
    """How many times longer a pass takes without each technique."""
    columns = [(c, k) for c, k in configured(figures) if k in (c["techniques"] or {})]
    if not columns:
        return []
    names = list(columns[0][0]["techniques"][columns[0][1]])
    titles = [f"{c['model']}, {c['dtype']}, {count} a pass" for c, count in columns]
    rows = [
        [name, *(f"{c['techniques'][count][name]['slowdown']:.2f}" for c, count in columns)]
        for name in names
    ]
    return table(["without", *titles], rows)


def start_table(figures: dict[str, Any]) -> list[str]:
    """Start-up of both in the comparison, and what switching trials costs."""
    head = ("model", "dtype", "start here, s", "start Heretic, s", "apply + restore", "of a trial")
    rows = []
    for found in figures["configurations"]:
        start, switch = found["start_up"], found["switch"]
        cost = ("", "")
        if switch:
            both = switch["apply_seconds"]["median"] + switch["restore_seconds"]["median"]
            cost = (f"{1000 * both:.0f} ms", f"{switch['percent_of_trial']:.1f} %")
        sums = [f"{sum(start[s].values()):.1f}" for s in ("ours_seconds", "peer_seconds")]
        rows.append((found["model"], found["dtype"], *sums, *cost))
    return table(head, rows)


def study_table(figures: dict[str, Any]) -> list[str]:
    """Whole studies, from the command to the frontier."""
    found = figures.get("study")
    if not found:
        return []
    rows = [
        (
            f"{title}, {found['model']}, {found['dtype']}, {found['trials']} trials",
            f"{side['first_trial_seconds']:.1f}",
            f"{side['seconds']:.1f}",
            " · ".join(f"{hits} at {kl:.3f}" for hits, kl in side["frontier"]),
        )
        for title, side in (("here", found["ours"]), ("Heretic", found["peer"]))
    ]
    head = ("", "first trial begins, s", "frontier, s", "frontier: refusals at KL")
    stopped = found["ours"].get("bounded", 0)
    said = f"Ratio of the whole: {found['ratio']:.2f}. {stopped} of the trials here were stopped."
    return [*table(head, rows), "", said]


def decode_table(figures: dict[str, Any]) -> list[str]:
    """Decode steps by trials per pass, and their floor."""
    ways = [n for n in ("recorded_ms", "launched_ms") if n in figures["measured"][0]]
    titles = {"recorded_ms": "recorded step, ms", "launched_ms": "launched step, ms"}
    head = ("trials a pass", *(titles[n] for n in ways), "floor, ms", "over floor", "ms a trial")
    rows = [
        (
            row["per_pass"],
            *(f"{row[n]:.1f}" for n in ways),
            f"{row['floor_ms']:.1f}",
            f"{row['over_floor']:.2f}",
            f"{row['ms_per_trial']:.1f}",
        )
        for row in figures["measured"]
    ]
    what = (
        f"{figures['shape']} in {figures['dtype']} with random weights on {figures['device']}: "
        f"{figures['rows']} prompts of {figures['prompt']} tokens, answers of {figures['tokens']}; "
        f"reads {figures['bytes_per_s'] / 1e9:.0f} GB/s."
    )
    return [what, "", *table(head, rows)]


def weights_table(figures: dict[str, Any]) -> list[str]:
    """The weight cache."""
    return table(
        ("cache, share of the model", "reload from the page cache over restore"),
        [(f"{100 * figures['cache_share']:.0f} %", figures["reload_over_restore"])],
    )


def node_memory_table(figures: dict[str, Any]) -> list[str]:
    """Replicas of a node, with pristine weights shared and one copy each."""
    found = {(row["location"], row["replicas"]): row for row in figures["rows"]}
    rows = []
    for count in sorted({replicas for _, replicas in found}):
        shared, apart = found["node", count], found["cpu", count]
        rows.append(
            (
                count,
                f"{apart['pss_bytes'] / GB:.2f}",
                f"{shared['pss_bytes'] / GB:.2f}",
                f"{shared['store_bytes'] / GB:.3f}",
                f"{count * shared['cache_bytes'] / GB:.3f}",
            )
        )
    head = (
        "replicas",
        "a copy each, GB",
        "shared, GB",
        "of it in the store, GB",
        "as copies that would be, GB",
    )
    return table(head, rows)


def export_table(figures: dict[str, Any]) -> list[str]:
    """Memory and time of a merged export."""
    rows = [
        (
            f"`{row['norm']}`",
            f"{row['bytes'] / GB:.2f}",
            f"{row['largest_writer_float32_bytes'] / GB:.3f}",
            f"{row['added_bytes'] / GB:.3f}",
            row["added_in_float32_writers"],
            f"{row['seconds']:.0f}",
        )
        for row in figures["rows"]
    ]
    head = (
        "norm",
        "written, GB",
        "largest writer in float32, GB",
        "added memory, GB",
        "in such writers",
        "seconds",
    )
    return table(head, rows)


def overhead_table(figures: dict[str, Any]) -> list[str]:
    """Ray, Tune and the sampler."""
    bare = sorted(figures["bare_ask_tell_ms"])[len(figures["bare_ask_tell_ms"]) // 2]
    return table(
        ("overhead per trial and slot, ms", "a bare ask/tell loop, ms"),
        [(figures["overhead_ms_median"], bare)],
    )


def throughput_table(figures: dict[str, Any]) -> list[str]:
    """Trials per hour by the number of GPUs, and how many cores all processes keep busy."""
    head = (
        "GPUs",
        "seconds a trial",
        "trials an hour",
        "ideal",
        "of ideal",
        "cores that this takes",
        "driver, CPU ms a trial",
        "object store, bytes a trial",
    )
    rows = [
        (
            row["gpus"],
            f"{row['trial_seconds']:g}",
            f"{row['trials_per_hour']:.0f}",
            f"{row['ideal_per_hour']:.0f}",
            f"**{100 * row['efficiency']:.1f} %**",
            f"{sum(row['cpu_seconds_per_trial'].values()) * row['trials_per_hour'] / 3600:.2f}",
            f"{1000 * row['cpu_seconds_per_trial']['driver']:.0f}",
            row["object_store_bytes_per_trial"],
        )
        for row in figures["gpus"]
    ]
    return table(head, rows)


SERIAL = ("driver", "pool", "control store")
"""Processes of which there is one, however many replicas there are."""
FULL = 0.5
"""A row below so much of the ideal is left out: something else than these processes held it up."""
LONG_SECONDS = 60
"""A trial of a model that is worth a cluster."""


def limits_table(figures: dict[str, Any]) -> list[str]:
    """Where each process that there is only one of has its core full.

    By the most GPUs whose trials went through nearly as they should.
    """
    most = [row for row in figures["gpus"] if row["efficiency"] > FULL][-1]
    short = figures["seconds"]
    head = (
        "one process",
        "CPU ms a trial",
        "trials a second at most",
        f"GPUs with trials of {short:g} s",
        f"GPUs with trials of {LONG_SECONDS} s",
    )
    rows = []
    for name in SERIAL:
        cost = most["cpu_seconds_per_trial"].get(name, 0)
        if cost:
            rate = 1 / cost
            rows.append(
                (
                    name,
                    f"{1000 * cost:.0f}",
                    f"1 / {cost:.3f} = {rate:.0f}",
                    f"{rate:.0f} × {short:g} = {rate * short:.0f}",
                    f"{rate:.0f} × {LONG_SECONDS} = {rate * LONG_SECONDS:.0f}",
                )
            )
    mb = most["trial_process_mb"]
    note = (
        f"A trial's process has {mb} MB of its own on the head: 64 take 64 × {mb} MB = "
        f"{64 * mb / 1000:.1f} GB, 256 take {256 * mb / 1000:.0f} GB. The journal grows by "
        f"{most['journal_bytes_per_trial']} bytes a trial."
    )
    return [*table(head, rows), "", note]


def sampler_table(figures: dict[str, Any]) -> list[str]:
    """Asking and telling by the size of the study."""
    sizes = figures["sizes"]
    rows = [
        ("asking, as a search does", *(clock(size["ask"]) for size in sizes)),
        ("telling, as a search does", *(clock(size["tell"]) for size in sizes)),
        *(
            (f"asking, {name}", *(clock(size["beside"][name]) for size in sizes))
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


def clock(values: dict[str, float]) -> str:
    """Milliseconds by the clock, and of the processor."""
    return f"{values['median_ms']:.1f} ({values['processor_ms']:.1f})"


def efficiency_table(figures: dict[str, Any]) -> list[str]:
    """What a budget finds, by plans in flight."""
    ways = figures["ways"]
    budgets = sorted({way["trials"] for way in ways})
    found = {(way["name"], way["liar"], way["trials"]): way for way in ways}
    head = ["", *(f"{n} trials{w}" for n in budgets for w in ("", ", no liar")), "time"]
    rows = []
    for name in dict.fromkeys(way["name"] for way in ways):
        cells = [found.get((name, liar, n)) for n in budgets for liar in (True, False)]
        longest = found[name, True, budgets[-1]]
        shown = [shares(way["shares"]) if way else "" for way in cells]
        rows.append((name, *shown, f"{longest['units']:.0f}"))
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


def shares(values: Sequence[float]) -> str:
    """Median and range of shares, in percent."""
    ordered = sorted(100 * value for value in values)
    return f"{median(ordered):.1f} ({ordered[0]:.0f} to {ordered[-1]:.0f})"


def faults_table(figures: dict[str, Any]) -> list[str]:
    """What each fault cost, and what the user reads."""
    rows = [
        (
            found["fault"],
            found["finished_before"],
            found["lost"],
            found["again"],
            found["failed"],
            f"{found['recovery_seconds']:.1f}",
            "<br>".join(dict.fromkeys(_bare(text) for text in found["seen"])),
        )
        for found in figures.values()
    ]
    head = (
        "what is done",
        "finished by then",
        "of these lost",
        "done again",
        "failed",
        "s to the next result",
        "what the user reads",
    )
    return table(head, rows)


def _bare(text: str) -> str:
    """Without addresses and ids of the machine it was measured on."""
    text = re.sub(r"\b\d+\.\d+\.\d+\.\d+\b", "NODE", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def streaming_table(figures: dict[str, Any]) -> list[str]:
    """A long text in each carry that takes constant memory."""
    head = (
        "carry",
        "model",
        "tokens",
        "tokens/s, whole text",
        "tokens/s here, plain loop",
        "resident MB at the first and last look",
        "growth, kB per 100,000 tokens",
        "handed on, kB",
    )
    rows = []
    for found in figures["lengths"]:
        looks = [bytes_ / 1e6 for _, bytes_ in found["memory"]]
        ours, plain = found["ours_tokens_per_second"], found["plain_tokens_per_second"]
        rows.append(
            (
                f"`{found['carry']}`",
                f"{found['family']}, {found['parameters'] / 1e6:.1f}M",
                f"{found['tokens']:,}",
                f"{found['tokens_per_second']:,.0f}",
                f"{median(ours):,.0f}, {median(plain):,.0f}",
                f"{looks[0]:.1f}, {looks[-1]:.1f}" if looks else "",
                f"{found['slope_bytes_per_100k'] / 1e3:.1f}",
                f"{found['carried_bytes'] / 1e3:.0f}",
            )
        )
    return table(head, rows)


def exactness_table(figures: dict[str, Any]) -> list[str]:
    """What each carry computes, by family."""
    carries = ("kv", "window", "state", "none")

    def cell(found: dict[str, Any]) -> str:
        if "refused" in found:
            return "–"
        steps = ", token by token" if found["single"] else ""
        return f"{found['difference']:.0e}{steps}"

    rows = [
        (row["family"], *(cell(row[carry]) for carry in carries)) for row in figures["exactness"]
    ]
    return table(("family", *(f"`{carry}`" for carry in carries)), rows)


def logits_table(figures: dict[str, Any]) -> list[str]:
    """Peak memory of one chunk, with all its logits and with slices of them."""
    columns = {
        "vocabulary": lambda row: f"{row['vocab']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "all logits, MB": lambda row: f"{row['plain'] / 1e6:,.0f}",
        "slices, MB": lambda row: f"{row['sliced'] / 1e6:,.0f}",
        "saved, MB": lambda row: f"**{(row['plain'] - row['sliced']) / 1e6:,.0f}**",
    }
    return column_table(columns, figures["logits"])


def evaluation_pool_table(figures: dict[str, Any]) -> list[str]:
    """Seconds by the number of readers, and how many times as fast as one they are."""
    one = figures["rows"][0]

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1f} s ({one[name] / row[name]:.2f} x)"

    ideal = figures["chunks"] * figures["seconds"]
    head = (
        "readers",
        f"independent chunks (two models; {2 * ideal:.1f} s by one reader without overhead)",
        "in order (one reader a model)",
        f"a suite ({ideal:.1f} s)",
    )
    names = ("apart", "in_order", "suite")
    rows = [[row["readers"], *(cell(row, name) for name in names)] for row in figures["rows"]]
    return table(head, rows)


def states_table(figures: dict[str, Any]) -> list[str]:
    """A text from a block on, with the states of the base model."""
    columns = {
        "edit begins at block": lambda row: f"{row['block']} of {row['blocks']}",
        "plain, s": lambda row: f"{row['plain']:.1f}",
        "recording, s": lambda row: f"{row['recording']:.1f}",
        "from there, s": lambda row: f"**{row['from']:.1f}**",
        "states, MB": lambda row: f"{row['bytes'] / 1e6:.0f}",
    }
    return column_table(columns, figures["states"])


def statistics_table(figures: dict[str, Any]) -> list[str]:
    """Peak memory and time of each statistic, by the number of prompts."""
    found = {(row["statistic"], row["prompts"]): row for row in figures["measured"]}
    sizes = sorted({prompts for _, prompts in found})
    names = {
        "sums": "count and mean, all layers",
        "variances": "and variances, all layers",
        "quantiles": "quantiles of magnitudes, all layers",
        "covariance": "covariance, one layer",
        "residuals": "residuals themselves, one layer",
    }

    def cell(row: dict[str, float]) -> str:
        return f"{row['added_bytes'] / 1e6:,.0f} MB, {row['seconds']:.2f} s"

    rows = [
        (name, *(cell(found[kind, size]) if (kind, size) in found else "–" for size in sizes))
        for kind, name in names.items()
    ]
    return table(("statistic", *(f"{size:,} prompts" for size in sizes)), rows)


def methods_table(figures: dict[str, Any]) -> list[str]:
    """Seconds of each method by size, and what it finds at the last size."""
    found = {(row["method"], row["prompts"], row["hidden"]): row for row in figures["measured"]}
    sizes = list(dict.fromkeys((prompts, hidden) for _, prompts, hidden in found))
    rows = [
        (
            f"`{name}`",
            *(f"{found[name, *size]['seconds']:.2f}" for size in sizes),
            *(f"{found[name, *size]['held_out_seconds']:.2f}" for size in sizes),
            f"{found[name, *sizes[-1]]['cosine']:.2f}",
            f"{found[name, *sizes[-1]]['cosine_outliers']:.2f}",
        )
        for name in dict.fromkeys(name for name, _, _ in found)
    ]
    seconds = (
        f"{what}, 2 × {prompts:,} × {hidden:,}"
        for what in ("s a layer", "held out")
        for prompts, hidden in sizes
    )
    return table(("method", *seconds, "cosine", "with outliers"), rows)


def folds_table(figures: dict[str, Any]) -> list[str]:
    """How often each number of folds finds the layer, by size."""
    found = {(row["prompts"], row["hidden"], row["folds"]): row for row in figures["measured"]}
    sizes = list(dict.fromkeys((prompts, hidden) for prompts, hidden, _ in found))
    rows = []
    for count in dict.fromkeys(folds for _, _, folds in found):
        own = [found[*size, count] for size in sizes]
        spreads = (f"{row['nothing_mean']:.2f} ± {row['nothing_spread']:.2f}" for row in own)
        rows.append((count, *(f"{row['found']:.0%}" for row in own), *spreads))
    heads = (
        f"{what}, 2 × {prompts} × {hidden:,}"
        for what in ("layer found", "AUROC of noise")
        for prompts, hidden in sizes
    )
    return table(("folds", *heads), rows)


def components_table(figures: dict[str, Any]) -> list[str]:
    """Rate and divergence with the stream's directions and with those of components."""
    found = {(row["directions"], row["layer"]): row for row in figures["measured"]}
    layers = list(dict.fromkeys(layer for _, layer in found))
    rows = [
        (
            "each layer's own" if layer is None else f"layer {layer}'s in all",
            *(
                f"{found[which, layer]['rate']:.2f}, {found[which, layer]['divergence']:.2f} nats"
                for which in ("stream", "own")
            ),
        )
        for layer in layers
    ]
    alike = ", ".join(
        f"{own['median']:.2f} ({own['least']:.2f} to {own['most']:.2f}) in `{name}`"
        for name, own in figures["neighbours"].items()
    )
    rows.append(("no edit", f"{figures['base']['rate']:.2f}, 0 nats", ""))
    return [
        *table(("demo model, strength 1 everywhere", "the stream's", "components' own"), rows),
        "",
        f"What is left of the behaviour (rate, {figures['scored']} prompts), and divergence. "
        f"Cosines of neighbouring layers' directions, median and range: {alike}.",
    ]


def seeing_table(figures: dict[str, Any]) -> list[str]:
    """Seconds and memory of looking at residuals and of comparing methods."""
    seconds = figures["seconds"]
    shape = (
        f"{2 * figures['prompts']:,} prompts × {figures['layers']} layers × "
        f"{figures['hidden']:,} units, {figures['file_bytes'] / GB:.1f} GB of files"
    )
    names = ", ".join(f"`{name}`" for name in figures["methods"])
    rows = [
        ("`residuals`: checksums, and all layers", f"{seconds['residuals']:.0f} s"),
        ("of these the checksums", f"{seconds['checksums']:.0f} s"),
        ("the page", f"{seconds['page']:.1f} s, {figures['page_bytes'] / 1e6:.1f} MB"),
        ("memory added by all layers", f"{figures['added_bytes'] / 1e6:,.0f} MB"),
        (f"`directions`, a layer: {names}", f"{seconds['directions_a_layer']:.1f} s"),
        ("their stability, at one layer, 2 pairs a size", f"{seconds['stability']:.1f} s"),
    ]
    return table((shape, ""), rows)


def direction_search_table(figures: dict[str, Any], models: Sequence[str]) -> list[str]:
    """Hypervolume by method and model, and by how much it differs from the difference of means."""
    found = {(row["model"], row["method"]): row for row in figures["methods"]}
    models = [name for name in models if name in {model for model, _ in found}]
    rows = []
    for method in dict.fromkeys(method for model, method in found if model in models):
        cells = [found.get((model, method)) for model in models]
        rows.append((f"`{method}`", *(cell for row in cells for cell in _searched(row))))
    heads = (f"{name}: %" for name in models)
    head = ("method", *(cell for name in heads for cell in (name, "more than the first")))
    notes = (
        f"`{name}`: {about['trials']} plans a search, measured from a rate of "
        f"{about['reference'][0]:g} and {about['reference'][1]:g} nats"
        for name, about in figures["models"].items()
        if name in models
    )
    lines = table(head, rows)
    return [*lines, "", f"{figures['seeds']} seeds. {'; '.join(notes)}."] if lines else []


def _searched(row: dict[str, Any] | None) -> tuple[str, str]:
    """Median and range of a method's volumes, and of its differences to the first method."""
    if row is None:
        return "", ""
    own, other = row["volume"], row["against"]
    volume = f"**{own['median']:.1f}** ({own['min']:.1f} to {own['max']:.1f})"
    if not other or row["method"] == "mean-difference":
        return volume, ""
    return volume, _paired(other)


def _paired(found: dict[str, Any]) -> str:
    """Median and range of paired differences, and at how many seeds there was more."""
    ends = f"{found['min']:+.1f} to {found['max']:+.1f}"
    return f"{found['median']:+.1f} ({ends}), {found['more']} of {found['seeds']}"


def seed_points_table(figures: dict[str, Any]) -> list[str]:
    """Hypervolume with and without seed points, by model and budget."""
    rows = [
        (
            f"`{row['model']}`",
            row["budget"],
            *(
                f"{row[way]['median']:.1f} ({row[way]['min']:.1f} to {row[way]['max']:.1f})"
                for way in ("with", "without")
            ),
            _paired(row["against"]),
        )
        for row in figures["budgets"]
    ]
    return table(("model", "plans", "with, %", "without, %", "more with"), rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "overview": ("trial", overview),
    "agreement": ("trial", agreement_table),
    "check": ("trial", check_table),
    "floor": ("trial", floor_table),
    "techniques": ("trial", technique_table),
    "start": ("trial", start_table),
    "study": ("trial-study", study_table),
    "decode": ("decode", decode_table),
    "weight-cache": ("weight_cache", weights_table),
    "node-memory": ("node_memory", node_memory_table),
    "export": ("export", export_table),
    "overhead": ("overhead", overhead_table),
    "throughput": ("scaling", throughput_table),
    "limits": ("scaling", limits_table),
    "components": ("components", components_table),
    "folds": ("folds", folds_table),
    "sampler": ("scaling-sampler", sampler_table),
    "faults": ("faults", faults_table),
    "streaming": ("streaming", streaming_table),
    "evaluation-pool": ("evaluation_pool", evaluation_pool_table),
    "exactness": ("streaming", exactness_table),
    "logits": ("streaming", logits_table),
    "states": ("streaming", states_table),
    "efficiency": ("scaling-efficiency", efficiency_table),
    "statistics": ("statistics", statistics_table),
    "methods": ("methods", methods_table),
    "seeing": ("seeing", seeing_table),
    "direction-search": (
        "direction_search",
        partial(direction_search_table, models=("clean", "outliers", "entangled")),
    ),
    "direction-search-demo": (
        "direction_search",
        partial(direction_search_table, models=("demo",)),
    ),
    "seed-points": ("direction_search", seed_points_table),
}


if __name__ == "__main__":
    main()
