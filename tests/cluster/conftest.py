"""One small cluster for all tests that are marked `ray`; nodes come and go in some of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness.simulated_cluster import simulated_cluster
from tests.support.ray_head import Head, ray_head
from tests.support.stand_in_replicas import OPEN

NODE_SECRETS = {
    "HF_TOKEN": "hf_NodesOwnHubToken0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_NodesOldHubToken0123456789abcdef",
    "WANDB_API_KEY": "nodes-wandb-key-0123456789abcdef",
}
"""In the environment of the head that tests start."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    with simulated_cluster(head_cpus=6) as simulated:
        yield simulated


@pytest.fixture(scope="module", autouse=True)
def cluster_where_marked(request: pytest.FixtureRequest) -> None:
    """Modules that are not marked, whose tests are of values, start no cluster."""
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("cluster")


@pytest.fixture(autouse=True)
def pools_end_with_their_test() -> Iterator[None]:
    yield
    OPEN.close()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with token authentication, for the tests that submit jobs to it or join it."""
    with ray_head(tmp_path_factory.mktemp("head"), NODE_SECRETS) as started:
        yield started
