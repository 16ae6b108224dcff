"""Directions: planted ones are found, degenerate ones are refused, layers interpolate."""

import logging
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_abliterate.directions import Directions, best_layer, compute, from_sums, separation
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.residuals import Residuals
from ray_abliterate.shards import Projected, ResidualShard, projected, sums_of
from ray_abliterate.testing.directions import planted_residuals


def test_the_neutral_mean_is_projected_out() -> None:
    behaviour, neutral, _ = planted_residuals(seed=1)
    shifted = Residuals(neutral.values + 3.0)
    found = compute(behaviour, shifted, DirectionSettings())
    mean = shifted.mean()
    cosines = (found.vectors.double() * mean).sum(-1) / mean.norm(dim=-1)
    assert cosines.abs().max() < 1e-6


def test_a_direction_parallel_to_the_neutral_mean_is_kept_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mean = torch.zeros(4, 1, 8)
    mean[..., 0] = 1.0
    with caplog.at_level(logging.WARNING):
        found = compute(Residuals(3 * mean), Residuals(mean), DirectionSettings())
    assert found.vectors[0, 0] == pytest.approx(1.0)
    assert "parallel to the neutral mean" in caplog.text


def test_identical_sets_are_refused() -> None:
    residuals = Residuals(torch.randn(5, 3, 8))
    with pytest.raises(ValueError, match="no layer has a direction"):
        compute(residuals, residuals, DirectionSettings())


def test_a_layer_without_a_difference_gets_no_direction_and_others_keep_theirs() -> None:
    behaviour, neutral, planted = planted_residuals(seed=2)
    same = neutral.values.clone()
    other = behaviour.values.clone()
    other[:, 0], same[:, 0] = 1.0, 1.0
    found = compute(Residuals(other), Residuals(same), DirectionSettings())
    assert found.usable[0] is False
    assert torch.isfinite(found.vectors).all()
    assert float(found.vectors[1] @ planted) > 0.9
    assert torch.equal(found.at(0.0), found.at(1.0))
    assert torch.equal(found.at(0.4), found.at(1.0))


def test_bytes_give_back_the_same_directions() -> None:
    behaviour, neutral, _ = planted_residuals(seed=3)
    found = compute(behaviour, neutral, DirectionSettings())
    again = Directions.from_bytes(found.to_bytes())
    assert torch.equal(again.vectors, found.vectors)
    assert (again.method, again.origin) == (found.method, found.origin)


def test_at_interpolates_and_its_blend_says_the_same() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    found = Directions(vectors, "m", {})
    for layer in (0.0, 1.3, 2.999, 3.0):
        unit = found.at(layer)
        assert unit.norm() == pytest.approx(1.0, abs=1e-6)
        total = sum(w * vectors[row] for row, w in found.blend(layer))
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(total, unit, rtol=0, atol=1e-6)
    assert torch.equal(
        found.at(2.0), torch.nn.functional.normalize(vectors[2].double(), dim=0).float()
    )


def test_opposite_neighbours_do_not_cancel() -> None:
    v = torch.nn.functional.normalize(torch.randn(16), dim=0)
    found = Directions(torch.stack([v, -v]), "m", {})
    assert abs(float(found.at(0.5) @ v)) == pytest.approx(1.0, abs=1e-6)


def test_a_layer_outside_the_model_is_refused() -> None:
    found = Directions(torch.nn.functional.normalize(torch.randn(4, 16), dim=-1), "m", {})
    with pytest.raises(ValueError, match="outside 0 to 3"):
        found.at(3.5)


def test_rows_that_are_not_of_unit_length_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 has length"):
        Directions(2 * torch.eye(2), "m", {})


def test_winsorising_finds_the_direction_behind_massive_activations() -> None:
    behaviour, neutral, planted = planted_residuals(seed=4, hidden=256)
    spiky = behaviour.values.clone()
    spiky[0, :, 7] = 1e4
    plain = compute(Residuals(spiky), neutral, DirectionSettings())
    clamped = compute(Residuals(spiky), neutral, DirectionSettings(winsorize_quantile=0.99))
    assert float(plain.vectors[1] @ planted) < 0.5
    assert float(clamped.vectors[1] @ planted) > 0.9


def test_separation_is_perfect_for_separated_sets_and_names_the_best_layer() -> None:
    behaviour, neutral, _ = planted_residuals(seed=5)
    b, n = behaviour.values.clone(), neutral.values.clone()
    b[:, 2] = torch.randn_like(b[:, 2])
    found = compute(Residuals(b), Residuals(n), DirectionSettings())
    rows = separation(along(found, split("behaviour", b, 7)), along(found, split("neutral", n, 7)))
    assert rows[0]["auroc"] == 1.0
    assert rows[0]["fisher"] > rows[2]["fisher"]
    assert best_layer(rows) != 2


def split(name: str, values: torch.Tensor, rows: int) -> list[ResidualShard]:
    starts = range(0, len(values), rows)
    return [ResidualShard.of(name, i, values[i : i + rows].numpy()) for i in starts]


def along(found: Directions, shards: list[ResidualShard]) -> Projected:
    return reduce(add, [projected(shard.batch, found.vectors.numpy()) for shard in shards])


@given(st.integers(1, 60), st.sampled_from([1.0, 0.9]), st.booleans())
@settings(max_examples=20)
def test_directions_from_shards_are_those_of_whole_sets(
    rows: int, quantile: float, project: bool
) -> None:
    sets = planted_residuals(seed=rows, prompts=40, hidden=48)[:2]
    wanted = DirectionSettings(winsorize_quantile=quantile, project_out_neutral=project)
    whole = compute(*sets, wanted)
    sums = [
        reduce(add, [sums_of(shard.batch, quantile) for shard in split("s", s.values, rows)])
        for s in sets
    ]
    found = from_sums(*sums, wanted, whole.origin)
    # float64 sums in another order, then one rounding to float32
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=2**-23, atol=1e-12)
    assert (found.method, found.origin) == (whole.method, whole.origin)


def test_separation_is_what_its_definitions_say() -> None:
    behaviour, neutral, _ = planted_residuals(seed=6, prompts=30, strength=1.0)
    found = compute(behaviour, neutral, DirectionSettings())
    rows = separation(
        along(found, split("behaviour", behaviour.values, 4)),
        along(found, split("neutral", neutral.values, 4)),
    )
    for layer, row in enumerate(rows):
        v = found.vectors[layer].double()
        a, b = (s.values[:, layer].double() @ v for s in (behaviour, neutral))
        wins = (a[:, None] > b[None]).double().mean()
        spread = a.var(unbiased=False) + b.var(unbiased=False)
        means = behaviour.mean()[layer], neutral.mean()[layer]
        assert row["layer"] == layer
        assert row["auroc"] == pytest.approx(float(wins), abs=1e-12)
        assert row["fisher"] == pytest.approx(float((a.mean() - b.mean()) ** 2 / spread))
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)))
        assert row["behaviour_norm"] == pytest.approx(float(means[0].norm()))
        assert row["neutral_norm"] == pytest.approx(float(means[1].norm()))
        assert row["direction_norm"] == pytest.approx(float((means[0] - means[1]).norm()))
