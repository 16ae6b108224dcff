"""Starts the replicas of a run, and records what they and the machine are."""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ray_abliterate.cluster.connection import connect, is_own_cluster
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ModelError
from ray_abliterate.model.source import resolve_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.recipe import Recipe

LIBRARIES = ("ray", "torch", "transformers", "optuna", "datasets", "safetensors", "pyarrow")
"""Packages whose versions are recorded with a run."""


@contextmanager
def start_replicas(
    recipe: Recipe,
    directory: RunDirectory,
    base: Path,
    scored: Mapping[str, PromptSet],
    record: EventRecorder,
    progress: Progress,
) -> Iterator[RunContext]:
    """Start a run's replicas; the block begins as soon as one can be used, and stops all of them.

    Args:
        recipe: Names the model and what it may use.
        directory: The run's. A run that has begun pins the revision of its model.
        base: The recipe's folder, where workers of a cluster find the user's own modules.
        scored: Prompts of the scorers that the replicas need, by the scorer's name.
        record: Receives what happens to the replicas.
        progress: Display of stages and notes.

    Raises:
        ModelError: the model cannot be loaded, or is not the one the run began with.
    """
    with progress.stage("model"):
        source = resolve_model(recipe.model.name, record.warn, not is_own_cluster())
    with ExitStack() as stack:
        with progress.stage("replicas"):
            dashboard = connect(recipe.run.dashboard, (str(base.resolve()),))
            starting = ReplicaPool.start(
                directory.pin_revision(recipe), source, scored, record.record
            )
            pool = stack.enter_context(starting)
        context = RunContext(recipe, directory, base, pool, record, progress, source)
        record_environment(context, dashboard)
        yield context


def record_environment(context: RunContext, dashboard: str = "") -> None:
    """Record versions, device, model and replicas in `environment.json`, and show the main facts.

    Args:
        context: A run whose replicas have been started.
        dashboard: Address of Ray's dashboard, if it has one.

    Raises:
        ModelError: the model's weights are not those that the run began with.
    """
    directory, progress = context.directory, context.progress
    name, facts = context.recipe.model.name, context.pool.facts
    replicas = context.pool.layout.replicas
    environment = directory.read_environment()
    recorded = environment.get("model", {}).get("fingerprint", facts.fingerprint)
    if recorded != facts.fingerprint:
        raise ModelError(
            f"the weights of {name} are not the ones the run began with.\n"
            "  Put them back (or pin model.revision), or start a new run with --to."
        )
    shape = asdict(facts.shape)
    model = {key: value for key, value in asdict(facts).items() if key != "shape"}
    directory.record_facts(
        model={"name": name, **shape, **model},
        replicas=asdict(context.pool.layout),
        versions={"python": platform.python_version(), **_versions()},
        machine=f"{platform.system()} {platform.machine()}",
        started=environment.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    share = facts.cache_bytes / facts.model_bytes
    progress.note(
        f"{name}: {facts.parameters / 1e6:,.0f} M parameters in {facts.dtype} on "
        f"{facts.device}, {facts.shape.layers} layers, {facts.writers} writers "
        f"({', '.join(facts.shape.components)}); weight cache {share:.0%} of the model; "
        f"{replicas} replica{'s' if replicas > 1 else ''}"
    )
    for note in facts.notes:
        progress.note(note)
    if dashboard:
        progress.note(f"Ray dashboard: http://{dashboard.removeprefix('http://')}")


def _versions() -> dict[str, str]:
    versions = {}
    for library in ("ray-abliterate", *LIBRARIES):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    return versions
