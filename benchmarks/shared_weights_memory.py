"""Memory of a node by its number of replicas: pristine weights shared, and one copy each.

    python -m benchmarks.shared_weights_memory [--replicas 1 2 4]

Real replicas of the demo model, in processes of their own. Counted is the proportional set size
(Linux: a page that k processes map counts 1/k in each) of all replicas together, and of it what
lies in the node's object store. A page of the store that Ray's own process maps too counts for
less than its size here, so shares of the store are a little low.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table, gigabytes

LOCATIONS = ("node", "cpu")
"""Values of `model.weight_cache`: shared by the replicas of a node, a copy in each."""
REPLICA_TITLE = "ReplicaActor"
"""Part of the command line of a replica's process, which Ray sets to the actor's class."""


def main() -> None:
    """Measure both locations at every number of replicas, print, save."""
    parser = CLAIM.parser(replicas=[1])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    rows = [
        {"replicas": count, "location": location, **measure(count, location)}
        for location in LOCATIONS
        for count in options.replicas
    ]
    CLAIM.save({"rows": rows}, options)
    for row in rows:
        print(row)


def measure(count: int, location: str) -> dict[str, Any]:
    """Return the bytes that all replicas hold once so many have started."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ra")
    import ray

    from ray_abliterate.cluster.connection import connect
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.data.builtin.demo_model import build_demo_model, demo_folder
    from ray_abliterate.recipe import Recipe

    folder = build_demo_model(demo_folder())
    prompts = {"builtin": "cooking-train", "split": "[:4]"}
    recipe = Recipe.model_validate(
        {
            "model": {
                "name": "demo",
                "replicas": count,
                "threads_per_replica": 1,
                "weight_cache": location,
            },
            "prompts": {"behaviour": prompts, "neutral": prompts},
            "scorers": [{"kind": "kl-divergence", "prompts": prompts}],
        }
    )
    connect(dashboard=False)
    try:
        with ReplicaPool.start(recipe, str(folder), {}) as pool:
            while pool.replicas < count:
                time.sleep(0.1)
            processes = psutil.Process().children(recursive=True)
            sizes = [proportional_bytes(p) for p in processes if is_replica(p)]
            facts = pool.facts
    finally:
        ray.shutdown()
    assert len(sizes) == count, f"{len(sizes)} processes for {count} replicas"
    return {
        "model_bytes": facts.model_bytes,
        "cache_bytes": facts.cache_bytes,
        "pss_bytes": sum(total for total, _ in sizes),
        "store_bytes": sum(store for _, store in sizes),
    }


def is_replica(process: psutil.Process) -> bool:
    """Return whether a replica lives in a process."""
    try:
        return REPLICA_TITLE in " ".join(process.cmdline()[:1])
    except psutil.Error:
        return False


def proportional_bytes(process: psutil.Process) -> tuple[int, int]:
    """Return a process's proportional set size, and how much of it is in the object store."""
    maps = process.memory_maps(grouped=True)
    store = sum(entry.pss for entry in maps if Path(entry.path).name.startswith("plasma"))
    return sum(entry.pss for entry in maps), store


def node_memory_table(figures: Figures) -> list[str]:
    """Return the memory of a node's replicas, with pristine weights shared and one copy each."""
    by_key = {(row["location"], row["replicas"]): row for row in figures["rows"]}
    counts = sorted({replicas for _, replicas in by_key})
    columns = {
        "replicas": lambda count: count,
        "a copy each, GB": lambda count: gigabytes(by_key["cpu", count]["pss_bytes"]),
        "shared, GB": lambda count: gigabytes(by_key["node", count]["pss_bytes"]),
        "of it in the store, GB": lambda count: gigabytes(by_key["node", count]["store_bytes"], 3),
        "as copies that would be, GB": lambda count: gigabytes(
            count * by_key["node", count]["cache_bytes"], 3
        ),
    }
    return column_table(columns, counts)


CLAIM = Claim(
    "shared_weights_memory",
    "Memory of a node by its number of replicas: pristine weights shared, and one copy each.",
    "node_memory",
    {"node-memory": node_memory_table},
)

if __name__ == "__main__":
    main()
