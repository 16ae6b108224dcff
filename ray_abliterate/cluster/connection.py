"""The connection to Ray: a cluster that is there, or one on this machine for this run."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray

from ray_abliterate.cluster.layout import Node

HEAD = "node:__internal_head__"
"""Every cluster has exactly 1 of this resource, on its head."""


def ours() -> bool:
    """Whether Ray runs for us alone, on this machine; otherwise it is a cluster that was joined."""
    return not os.environ.get("RAY_ADDRESS")


def connect(dashboard: bool = True, python_path: Sequence[str] = ()) -> str:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray on this machine, for this run alone.

    Without an address, Ray would join whatever `ray start` began here last.

    Returns:
        The dashboard's address, or nothing.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        paths = [*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        options: dict[str, Any] = {}
        if ours():
            options = {"address": "local", "include_dashboard": dashboard}
            options |= {"dashboard_host": "127.0.0.1"}
            # Workers inherit it. With an environment of the job's own they would all be started
            # anew, beside the idle ones that Ray starts at once.
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        elif paths:
            options = {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    return str(getattr(ray._private.worker._global_node, "webui_url", "") or "")


def nodes() -> tuple[Node, ...]:
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
