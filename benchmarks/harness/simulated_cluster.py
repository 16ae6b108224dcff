"""A Ray cluster on one machine: a head, and nodes that come and go. Tests use it, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def simulated_cluster(
    head_cpus: int, runtime_environment: dict[str, Any] | None = None, **head: Any
) -> Iterator[Any]:
    """Connect this process to a new cluster without a dashboard; the block adds its nodes.

    Args:
        head_cpus: Logical cores of the head node.
        runtime_environment: Ray's `runtime_env` of this process's tasks and actors.
        **head: Further arguments of the head node.

    Yields:
        Ray's `Cluster`.
    """
    import ray
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": head_cpus, "include_dashboard": False, **head}
    # Hooks for the end of the process could only be set in the main thread; some callers add nodes
    # in another.
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=arguments)
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=runtime_environment,
    )
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
