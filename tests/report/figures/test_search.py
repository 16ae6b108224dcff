"""How the search went, read back from the page that embeds it."""

from ray_abliterate.pipeline.directory import RunDirectory
from tests.support.report_runs import (
    page,
)


def test_the_hypervolume_never_shrinks_and_names_its_reference(two: RunDirectory) -> None:
    parsed = page(two)
    shares = parsed.traces("hypervolume")["share"]["y"]
    assert len(shares) == 12 and shares == sorted(shares)
    assert "reference point (keyword-rate" in parsed.figures["hypervolume"]["note"]
