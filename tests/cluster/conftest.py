"""One small cluster for all cluster tests; nodes come and go in some of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.fault_recovery import small_cluster
from tests.cluster.head import Head, ray_head
from tests.cluster.hosts import OPEN

NODE_SECRETS = {
    "HF_TOKEN": "hf_NodesOwnHubToken0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_NodesOldHubToken0123456789abcdef",
    "WANDB_API_KEY": "nodes-wandb-key-0123456789abcdef",
}
"""In the environment of the head that tests start."""


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[Any]:
    with small_cluster() as found:
        yield found


@pytest.fixture(autouse=True)
def pools_end_with_their_test() -> Iterator[None]:
    yield
    OPEN.close()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with token authentication, for the tests that submit jobs to it or join it."""
    with ray_head(tmp_path_factory.mktemp("head"), NODE_SECRETS) as started:
        yield started
