"""A run that several tests look at."""

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from tests.support.report_runs import BASE, TWO, card, divergence, make, rate


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two objectives, twelve finished trials, one failed."""
    later = [card(rate(60 + n), divergence(0.6 + 0.1 * n)) for n in range(8)]
    cards = [*TWO, "RuntimeError: replica died", *later]
    return make(tmp_path_factory.mktemp("two"), cards, BASE, warnings=["the sets <i>overlap</i>"])
