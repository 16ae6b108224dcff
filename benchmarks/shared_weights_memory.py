"""Memory of a node by its number of replicas: pristine weights shared, and one copy each.

    python -m benchmarks.shared_weights_memory [--replicas 1 2 4]

Real replicas of the demo model, in processes of their own. Counted is the proportional set size
(Linux: a page that k processes map counts 1/k in each), of all replicas together, and of it what
lies in the node's object store. A page of the store that Ray's own process maps too counts for
less than its size here, so shares of the store are a little low.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.record import save

LOCATIONS = ("node", "cpu")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    rows = [
        {"replicas": count, "location": location, **measure(count, location)}
        for location in LOCATIONS
        for count in options.replicas
    ]
    print(save("node_memory", {"rows": rows}))
    for row in rows:
        print(row)


def measure(count: int, location: str) -> dict[str, Any]:
    """Bytes of all replicas, once so many are up."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ra")
    import ray

    from ray_abliterate.cluster.connection import connect
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.data.builtin import demo_model as demo
    from ray_abliterate.recipe import Recipe

    folder = demo.build_demo_model(demo.default_folder())
    own = {"name": "demo", "replicas": count, "threads_per_replica": 1, "weight_cache": location}
    prompts = {"builtin": "cooking-train", "split": "[:4]"}
    recipe = Recipe.model_validate(
        {
            "model": own,
            "prompts": {"behaviour": prompts, "neutral": prompts},
            "scorers": [{"kind": "kl-divergence", "prompts": prompts}],
        }
    )
    connect(dashboard=False)
    try:
        with ReplicaPool.start(recipe, str(folder), {}) as pool:
            while pool.replicas < count:
                time.sleep(0.1)
            found = [memory(p) for p in psutil.Process().children(recursive=True) if is_replica(p)]
            facts = pool.facts
    finally:
        ray.shutdown()
    assert len(found) == count, f"{len(found)} processes for {count} replicas"
    return {
        "model_bytes": facts.model_bytes,
        "cache_bytes": facts.cache_bytes,
        "pss_bytes": sum(total for total, _ in found),
        "store_bytes": sum(store for _, store in found),
    }


def is_replica(process: psutil.Process) -> bool:
    """Whether a replica lives in a process."""
    try:
        return "ReplicaHost" in " ".join(process.cmdline()[:1])
    except psutil.Error:
        return False


def memory(process: psutil.Process) -> tuple[int, int]:
    """Proportional set size, and how much of it is in the object store."""
    maps = process.memory_maps(grouped=True)
    store = sum(entry.pss for entry in maps if Path(entry.path).name.startswith("plasma"))
    return sum(entry.pss for entry in maps), store


if __name__ == "__main__":
    main()
