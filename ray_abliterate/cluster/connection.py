"""The connection to Ray: a cluster that is there, or one on this machine for this run."""

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
    """Whether Ray runs for us alone, on this machine; otherwise it is a cluster that was joined."""
    return not os.environ.get("RAY_ADDRESS")


def connect(dashboard: bool = True, python_path: Sequence[str] = ()) -> str:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray on this machine, for this run alone.

    Without an address, Ray would join whatever `ray start` began here last.

    Args:
        dashboard: Start it, if Ray is started.
        python_path: Folders that workers find modules in, before those of `PYTHONPATH`.

    Returns:
        The dashboard's address, or nothing.

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
            # Workers inherit it. With an environment of the job's own they would all be started
            # anew, beside the idle ones that Ray starts at once.
            os.environ["PYTHONPATH"] = path
        elif path:
            options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        if not is_own_cluster():
            _refuse_workers_without_us(path)
    return str(getattr(ray._private.worker._global_node, "webui_url", "") or "")


def workers_path(first: Sequence[str] = ()) -> str:
    """`PYTHONPATH` for workers, in whole paths, since their working folder may be another one.

    Our own folder ends it, if that is none of those that every Python looks in.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [os.path.abspath(folder) for folder in (*first, *given) if folder]
    everywhere = (*site.getsitepackages(), site.getusersitepackages())
    home = Path(__file__).resolve().parents[2]
    if home not in [Path(folder).resolve() for folder in everywhere]:
        paths.append(str(home))
    return os.pathsep.join(dict.fromkeys(paths))


def _refuse_workers_without_us(path: str) -> None:
    """Let a worker on this node import what the pool's process is made of.

    Ray starts an actor that can't be imported again and again, for ever.

    Raises:
        SearchError: it can't.
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
            f"  {INSTALL}\n  PYTHONPATH of the workers is {path!r} now."
        ) from None


def live_nodes() -> tuple[Node, ...]:
    """The machines that are alive, the head first."""
    found = [
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
    return tuple(node for _, _, node in sorted(found, key=lambda item: item[:2]))
