"""The connection to Ray: an existing cluster, or one that is started here for this run."""

import logging
import os
import site
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_abliterate.cluster.placement import Node
from ray_abliterate.cluster.remote_errors import INSTALL
from ray_abliterate.errors import SearchError

HEAD = "node:__internal_head__"
"""Every cluster has exactly 1 of this resource, on its head."""


def is_own_cluster() -> bool:
    """Return whether Ray runs on this machine for this run alone, not as a cluster it joined."""
    return not os.environ.get("RAY_ADDRESS")


def connect(dashboard: bool = True, python_path: Sequence[str] = ()) -> str:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray on this machine, for this run alone.

    Without an address, Ray would join whatever `ray start` began here last.

    Args:
        dashboard: Start the dashboard, if Ray is started.
        python_path: Folders that workers find modules in, before those of `PYTHONPATH`.

    Returns:
        The dashboard's address, or an empty string.

    Raises:
        SearchError: the cluster's workers can't import this package.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        path = workers_path(python_path)
        options: dict[str, Any] = {}
        if is_own_cluster():
            options = {"address": "local", "include_dashboard": dashboard}
            options |= {"dashboard_host": "127.0.0.1"}
            # Workers inherit it. With an environment of the job's own, Ray would start new ones
            # besides the idle ones that it starts at once.
            os.environ["PYTHONPATH"] = path
        elif path:
            options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        if not is_own_cluster():
            _refuse_workers_without_package(path)
    return str(getattr(ray._private.worker._global_node, "webui_url", "") or "")


def workers_path(first: Sequence[str] = ()) -> str:
    """Return `PYTHONPATH` for workers, as absolute paths: their working folder may differ.

    The package's own folder comes last, unless Python looks there anyway.

    Args:
        first: Folders that come before those of this process's `PYTHONPATH`.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [os.path.abspath(folder) for folder in (*first, *given) if folder]
    everywhere = (*site.getsitepackages(), site.getusersitepackages())
    home = Path(__file__).resolve().parents[2]
    if home not in [Path(folder).resolve() for folder in everywhere]:
        paths.append(str(home))
    return os.pathsep.join(dict.fromkeys(paths))


def _refuse_workers_without_package(path: str) -> None:
    """Have a worker on this node import what the pool's process is made of.

    Ray restarts an actor that can't be imported again and again, forever.

    Raises:
        SearchError: the worker can't import it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
    task = ray.remote(import_module).options(name="import ray_abliterate", **options)
    try:
        ray.get(task.remote("ray_abliterate.cluster.pool_actor"))
    except RayTaskError as error:
        if not isinstance(error.cause, ImportError):
            raise
        raise SearchError(
            f"Ray's workers on this node can't import ray_abliterate ({error.cause}).\n"
            f"  {INSTALL}\n  The workers' PYTHONPATH is {path!r}."
        ) from None


def live_nodes() -> tuple[Node, ...]:
    """Return the machines that are alive, the head first."""
    nodes = [
        (
            HEAD not in entry["Resources"],
            entry["NodeID"],
            Node(
                entry["NodeID"],
                entry["NodeName"] or entry["NodeManagerHostname"],
                entry["Resources"].get("CPU", 0.0),
                entry["Resources"].get("GPU", 0.0),
                entry["Resources"].get("memory", 0.0),
            ),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return tuple(node for _, _, node in sorted(nodes, key=lambda item: item[:2]))
