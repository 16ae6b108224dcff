"""One small Ray for all cluster tests."""

from collections.abc import Iterator

import pytest
import ray

from tests.cluster.head import Head, ray_head

NODE_SECRETS = {
    "HF_TOKEN": "hf_NodesOwnHubToken0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_NodesOldHubToken0123456789abcdef",
    "WANDB_API_KEY": "nodes-wandb-key-0123456789abcdef",
}
"""In the environment of the head that tests start."""


@pytest.fixture(scope="session", autouse=True)
def small_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with token authentication, for the tests that submit jobs to it or join it."""
    with ray_head(tmp_path_factory.mktemp("head"), NODE_SECRETS) as started:
        yield started
