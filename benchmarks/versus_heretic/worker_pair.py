"""The peer's process and ours, loaded for one model and dtype, and measured in turns."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.worker_process import Worker
from benchmarks.versus_heretic.comparison_setup import ComparisonSetup
from benchmarks.versus_heretic.shared_plans import COMPONENTS, draw, to_peer
from ray_abliterate.search.plan import ModelShape, Plan

SETTLE_SECONDS = 0.3
"""Pause before each measurement: threads of the other process stop spinning."""
WARM_UP_SEED = 1000


class WorkerPair:
    """The peer and, by trials per pass, our processes; all end with the `with` block.

    Attributes:
        setup: The comparison's.
        name: Model and dtype, for progress.
        peer: The peer's process.
        peer_facts: What it reported about itself when it had loaded.
        ours: Our processes by trials per pass.
        our_facts: What they reported.
        cosines: Of each layer's direction with the peer's own.
        shape: The model's.
    """

    def __init__(
        self, setup: ComparisonSetup, model: str, dtype: str, norm: str, per_pass: list[int]
    ) -> None:
        """Start all processes and load the model in each.

        Args:
            setup: The comparison's.
            model: Name of the model.
            dtype: `bfloat16` or `float32`.
            norm: Norm mode as a recipe names it.
            per_pass: Trials per pass of our processes, one for each.

        Raises:
            ValueError: The two sides see different models.
            WorkerError: A process could not load the model.
        """
        self.name = f"{Path(model).name} {dtype}"
        self.setup = setup
        self.ours: dict[int, Worker] = {}
        self.our_facts: dict[int, dict[str, Any]] = {}
        self._stack = ExitStack()
        try:
            self._load(model, dtype, norm, per_pass)
        except BaseException:
            self._stack.close()
            raise

    def _load(self, model: str, dtype: str, norm: str, per_pass: list[int]) -> None:
        setup = self.setup
        self.peer = self._worker(setup.peer_python, "benchmarks.versus_heretic.heretic_worker")
        settings = setup.peer_settings(model, dtype, norm, setup.options.start_up)
        self.peer_facts = self.peer.call("load", settings=settings, threads=setup.threads)
        file = setup.folder / f"{Path(model).name}-{dtype}-{norm}.safetensors"
        arguments = {
            "recipe": setup.our_recipe(model, dtype, norm, self.peer_facts),
            "prompts": setup.prompts,
            "system": self.peer_facts["system_prompt"],
            "threads": setup.threads,
            "directions": str(file),
        }
        for count in sorted(per_pass):
            python = Path(sys.executable)
            self.ours[count] = self._worker(python, "benchmarks.versus_heretic.our_worker")
            self.our_facts[count] = self.ours[count].call("load", **arguments)
        self.cosines = self.peer.call("directions", path=str(file))["cosines"]
        self.shape = shared_shape(next(iter(self.our_facts.values())), self.peer_facts)

    def _worker(self, python: Path, module: str) -> Worker:
        return self._stack.enter_context(
            Worker(python, module, self.setup.folder, self.setup.threads)
        )

    def __enter__(self) -> "WorkerPair":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def warm_up(self, norm: Any) -> None:
        """Run one pass of each process that is not counted: memory is touched, products known."""
        for count, worker in self.ours.items():
            plans = draw(self.shape, norm, count, WARM_UP_SEED)
            worker.call("trial", plans=[plan.to_json() for plan in plans])
        plan = draw(self.shape, norm, 1, WARM_UP_SEED)[0]
        self.peer.call("trial", **to_peer(plan))

    def run_in_turns(self, plans: list[Plan]) -> tuple[dict[int, list[Any]], list[Any]]:
        """Return our passes by trials per pass, and the peer's trials, each after a pause."""
        ours: dict[int, list[Any]] = {count: [] for count in self.ours}
        peer = []
        for index, plan in enumerate(plans):
            for count, worker in self.ours.items():
                if index % count == 0:
                    group = [p.to_json() for p in plans[index : index + count]]
                    ours[count].append(call_after_pause(worker, "trial", plans=group))
            peer.append(call_after_pause(self.peer, "trial", **to_peer(plan)))
            print(f"{self.name}: {index + 1}/{len(plans)}", file=sys.stderr)
        return ours, peer


def shared_shape(ours: dict[str, Any], peer: dict[str, Any]) -> ModelShape:
    """Return the shape that both sides see.

    Args:
        ours: What our process reported.
        peer: What the peer's process reported.

    Raises:
        ValueError: They see different layers, components, dtypes or threads.
    """
    mapped = sorted(COMPONENTS[c] for c in ours["components"])
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


def call_after_pause(worker: Worker, command: str, **arguments: Any) -> dict[str, Any]:
    """Call a worker after the others' threads have stopped spinning."""
    time.sleep(SETTLE_SECONDS)
    return worker.call(command, **arguments)
