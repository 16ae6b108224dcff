"""Where second moments are computed, by the number of prompts and units."""

from ray_abliterate.directions.residuals.subspace import choose_subspace


def test_few_prompts_are_handled_in_their_span_and_many_as_a_covariance() -> None:
    few, many, more = (
        choose_subspace(800, 8192),
        choose_subspace(8192, 8192),
        choose_subspace(80_000, 8192),
    )
    assert few.kind == "samples"
    assert "800 prompts are fewer than 8192 units" in few.reason
    assert (many.kind, more.kind) == ("covariance", "covariance")
    assert many.bytes == more.bytes  # whatever the number of prompts
    assert few.bytes < many.bytes
    assert "2.1 GB at a time" in many.reason
    assert "nothing smaller is exact" in choose_subspace(40_000, 40_000).reason
