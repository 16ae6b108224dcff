"""One small cluster for all cluster tests; nodes come and go in some of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.faults import small_cluster
from tests.cluster.hosts import OPEN


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[Any]:
    with small_cluster() as found:
        yield found


@pytest.fixture(autouse=True)
def pools_end_with_their_test() -> Iterator[None]:
    yield
    OPEN.close()
