"""What each fault costs: really caused, to processes that were started for it, counted and timed.

    python -m benchmarks.fault_recovery [NAME ...]

Stand-ins for replicas score at once and take a fixed time; everything else is the real thing: the
pool, the fleet, Tune, the study, and for faults of the driver the command line with the planted
model. A scenario raises if a finished trial is lost, or the study doesn't end at its number.
"""

import re
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.fault_recovery import cluster_faults, driver_faults
from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.simulated_cluster import simulated_cluster
from benchmarks.harness.tables import column_table

ON_CLUSTER = (
    cluster_faults.replica_killed,
    cluster_faults.trial_process_killed,
    cluster_faults.pool_killed,
    cluster_faults.replica_hangs,
    cluster_faults.no_memory_in_a_replica,
    cluster_faults.node_out_of_memory,
    cluster_faults.no_memory_on_a_device,
    cluster_faults.node_removed,
    cluster_faults.node_joined,
    cluster_faults.broken_node,
    cluster_faults.object_store_full,
)
ON_COMMAND_LINE = (
    driver_faults.driver_killed,
    driver_faults.terminated,
    driver_faults.disk_full,
    driver_faults.two_drivers,
    driver_faults.torn_journal,
    driver_faults.damaged_shard,
    driver_faults.clock_jumps,
)
SCENARIOS = {scenario.__name__: scenario for scenario in (*ON_CLUSTER, *ON_COMMAND_LINE)}
HEAD_CPUS = 6


def main() -> None:
    """Cause the faults, print what each cost, save if all were caused."""
    parser = CLAIM.parser(names=["replica_killed", "terminated"])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all if none is given: {', '.join(SCENARIOS)}"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(SCENARIOS)
    if unknown:
        known = ", ".join(SCENARIOS)
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {known}")
    figures = cause(options.names or list(SCENARIOS))
    if not options.names:
        CLAIM.save(figures, options)
    print(f"finished trials lost: {sum(entry['lost'] for entry in figures.values())}")


def cause(names: list[str]) -> Figures:
    """Return what each fault cost, by its name; those of a GPU are left out where there is none."""
    import torch

    figures: Figures = {}
    with ExitStack() as stack:
        cluster = stack.enter_context(simulated_cluster(HEAD_CPUS))
        for name in (name for name in SCENARIOS if name in names):
            scenario = SCENARIOS[name]
            if scenario is cluster_faults.no_memory_on_a_device and not torch.cuda.is_available():
                print(f"{name}: not done, there is no GPU")
                continue
            with tempfile.TemporaryDirectory(prefix="fault-") as scratch:
                outcome = scenario(Path(scratch), cluster)
            figures[name] = {"fault": (scenario.__doc__ or "").strip(), **asdict(outcome)}
            print(f"{name}: {outcome}", flush=True)
    return figures


def faults_table(figures: Figures) -> list[str]:
    """Return what each fault cost, and what the user reads."""
    columns = {
        "what is done": lambda row: row["fault"],
        "finished by then": lambda row: row["finished_before"],
        "of these lost": lambda row: row["lost"],
        "done again": lambda row: row["again"],
        "failed": lambda row: row["failed"],
        "s to the next result": lambda row: f"{row['recovery_seconds']:.1f}",
        "what the user reads": lambda row: "<br>".join(dict.fromkeys(map(_escaped, row["seen"]))),
    }
    return column_table(columns, list(figures.values()))


def _escaped(text: str) -> str:
    """Return text for a cell, without addresses of the machine that it was measured on."""
    text = re.sub(r"\b\d+\.\d+\.\d+\.\d+\b", "NODE", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


CLAIM = Claim(
    "fault_recovery",
    "What each fault of a replica, trial, node, driver, disk or clock costs.",
    "faults",
    {"faults": faults_table},
)
