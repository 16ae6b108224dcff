"""Directions: planted ones are found, degenerate ones are refused, layers interpolate."""

import logging
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_abliterate.directions.compute import directions_from_residuals, directions_from_sums
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_separation import (
    ProjectedSet,
    best_layer,
    measure_layer_separation,
)
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.directions.residuals.shard import ResidualShard, Sums, sums_of
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.testing.directions import planted_residuals


def test_the_neutral_mean_is_projected_out() -> None:
    behaviour, neutral, _ = planted_residuals(seed=1)
    shifted = Residuals(neutral.values + 3.0)
    found = directions_from_residuals(behaviour, shifted, DirectionSettings())
    mean = shifted.mean()
    cosines = (found.vectors.double() * mean).sum(-1) / mean.norm(dim=-1)
    assert cosines.abs().max() < 1e-6


def test_a_direction_parallel_to_the_neutral_mean_is_used_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mean = torch.zeros(4, 1, 8)
    mean[..., 0] = 1.0
    with caplog.at_level(logging.WARNING):
        found = directions_from_residuals(Residuals(3 * mean), Residuals(mean), DirectionSettings())
    assert found.vectors[0, 0] == pytest.approx(1.0)
    assert "parallel to the neutral mean" in caplog.text


def test_identical_sets_are_refused() -> None:
    residuals = Residuals(torch.randn(5, 3, 8))
    with pytest.raises(ValueError, match="no layer has a direction"):
        directions_from_residuals(residuals, residuals, DirectionSettings())


def test_a_layer_without_a_difference_gets_no_direction_and_others_keep_theirs() -> None:
    behaviour, neutral, planted = planted_residuals(seed=2)
    same = neutral.values.clone()
    other = behaviour.values.clone()
    other[:, 0], same[:, 0] = 1.0, 1.0
    found = directions_from_residuals(Residuals(other), Residuals(same), DirectionSettings())
    assert found.usable[0] is False
    assert torch.isfinite(found.vectors).all()
    assert float(found.vectors[1] @ planted) > 0.9
    assert torch.equal(found.at(0.0), found.at(1.0))
    assert torch.equal(found.at(0.4), found.at(1.0))


def test_bytes_give_back_the_same_directions() -> None:
    behaviour, neutral, _ = planted_residuals(seed=3)
    found = directions_from_residuals(behaviour, neutral, DirectionSettings())
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
    plain = directions_from_residuals(Residuals(spiky), neutral, DirectionSettings())
    clamped = directions_from_residuals(
        Residuals(spiky), neutral, DirectionSettings(winsorize_quantile=0.99)
    )
    assert float(plain.vectors[1] @ planted) < 0.5
    assert float(clamped.vectors[1] @ planted) > 0.9


def test_the_best_layer_is_named_and_the_last_fifth_is_left_aside() -> None:
    rows = [{"layer": i, "fisher": f, "auroc": 1.0} for i, f in enumerate((1.0, 3.0, 2.0, 1.5, 9))]
    assert best_layer(rows) == best_layer(rows, "auroc") == 1


def test_where_no_prompt_can_be_held_out_the_means_that_lie_farthest_apart_decide() -> None:
    """In their own lengths, which grow over the layers of a model."""
    lengths = ((1.0, 0.1), (10.0, 5.0), (100.0, 20.0), (1000.0, 100.0), (1.0, 9.0))
    rows = [
        {"layer": i, "fisher": 0.0, "auroc": 0.5, "behaviour_norm": norm, "neutral_norm": norm,
         "direction_norm": gap}
        for i, (norm, gap) in enumerate(lengths)
    ]  # fmt: skip
    assert best_layer(rows) == best_layer(rows, "auroc") == 1


def split(name: str, values: torch.Tensor, rows: int) -> list[ResidualShard]:
    starts = range(0, len(values), rows)
    return [ResidualShard.of(name, i, values[i : i + rows].numpy()) for i in starts]


@given(st.integers(1, 60), st.sampled_from([1.0, 0.9]), st.booleans())
@settings(max_examples=20)
def test_directions_from_shards_are_those_of_whole_sets(
    rows: int, quantile: float, project: bool
) -> None:
    sets = planted_residuals(seed=rows, prompts=40, hidden=48)[:2]
    wanted = DirectionSettings(winsorize_quantile=quantile, project_out_neutral=project)
    whole = directions_from_residuals(*sets, wanted)
    sums = [
        reduce(add, [sums_of(shard.batch, quantile) for shard in split("s", s.values, rows)])
        for s in sets
    ]
    found = directions_from_sums(*sums, wanted, whole.origin)
    # float64 sums in another order, then one rounding to float32
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=2**-23, atol=1e-12)
    assert (found.method, found.origin) == (whole.method, whole.origin)


def test_separation_is_what_its_definitions_say() -> None:
    behaviour, neutral, _ = planted_residuals(seed=6, prompts=30, strength=1.0)
    found = directions_from_residuals(behaviour, neutral, DirectionSettings())
    random = torch.Generator().manual_seed(1)
    along = [torch.randn(30, 4, generator=random).double() + shift for shift in (0.5, 0)]
    sides = [
        ProjectedSet(Sums(len(s.values), s.values.double().sum(0).numpy()), one.numpy())
        for s, one in zip((behaviour, neutral), along, strict=True)
    ]
    for layer, row in enumerate(measure_layer_separation(*sides, found)):
        a, b = (one[:, layer] for one in along)
        wins = (a[:, None] > b[None]).double().mean()
        spread = a.var(unbiased=False) + b.var(unbiased=False)
        means = behaviour.mean()[layer], neutral.mean()[layer]
        apart = means[0] - means[1]
        assert row["layer"] == layer
        assert row["auroc"] == pytest.approx(float(wins), abs=1e-12)
        assert row["fisher"] == pytest.approx(float((a.mean() - b.mean()) ** 2 / spread))
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)))
        assert row["behaviour_norm"] == pytest.approx(float(means[0].norm()))
        assert row["neutral_norm"] == pytest.approx(float(means[1].norm()))
        assert row["direction_norm"] == pytest.approx(float(apart.norm()))
        assert row["gap"] == pytest.approx(float(apart @ found.vectors[layer].double()))


# Several directions a layer


def subspaces(layers: int, rank: int, seed: int = 0, hidden: int = 16, **more: Any) -> Directions:
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(layers, hidden, rank, generator=random)).Q.mT
    return Directions(basis[:, 0].contiguous(), "m", {}, basis[:, 1:].contiguous(), **more)


def projector(vectors: torch.Tensor) -> torch.Tensor:
    q = torch.linalg.qr(vectors.double().T).Q
    return q @ q.T


def blended(found: Directions, layer: float, target: int | None = None) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([weight * found.rows[row].double() for row, weight in blend]).sum(0)
            for blend in found.blends(layer, target)
        ]
    )


def test_bytes_give_back_all_directions_and_a_file_of_one_has_no_more_than_before() -> None:
    spared = subspaces(3, 1, seed=7).vectors
    for found in (subspaces(3, 3), subspaces(3, 2, spared=spared)):
        again = Directions.from_bytes(found.to_bytes())
        assert torch.equal(again.rows, found.rows)
        assert again.rank == found.rank
        assert (again.spared is None) == (found.spared is None)
    alone = Directions(spared, "m", {})
    assert Directions.from_bytes(alone.to_bytes()).further is None
    assert b"further" not in alone.to_bytes()


def test_directions_that_are_not_orthonormal_are_refused() -> None:
    found = subspaces(3, 2)
    assert found.further is not None
    oblique = found.further.clone()
    oblique[1, 0] = torch.nn.functional.normalize(found.vectors[1] + oblique[1, 0], dim=0)
    for wrong in (oblique, 2 * found.further):
        with pytest.raises(ValueError, match=r"layer [01] are not orthonormal"):
            Directions(found.vectors, "m", {}, wrong)


def test_at_a_layer_its_own_subspace_is_used() -> None:
    found = subspaces(4, 3)
    for layer in range(4):
        torch.testing.assert_close(blended(found, float(layer)).float(), found.basis[layer])


def test_between_layers_a_subspace_depends_on_no_choice_of_basis() -> None:
    """Turning the vectors of one layer among themselves changes nothing."""
    found = subspaces(2, 3, seed=3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    turned = turn @ found.basis[1]
    other = Directions(
        torch.stack([found.vectors[0], turned[0]]), "m", {},
        torch.stack([found.basis[0, 1:], turned[1:]]),
    )  # fmt: skip
    for layer in (0.25, 0.5, 0.9):
        one = projector(blended(found, layer))
        torch.testing.assert_close(projector(blended(other, layer)), one, rtol=0, atol=1e-5)


def test_between_layers_that_agree_the_subspace_is_theirs() -> None:
    found = subspaces(1, 2)
    turned = torch.stack([found.basis[0, 1], -found.basis[0, 0]])
    both = Directions(
        torch.stack([found.vectors[0], turned[0]]), "m", {},
        torch.stack([found.basis[0, 1:], turned[1:]]),
    )  # fmt: skip
    expected = projector(found.basis[0])
    torch.testing.assert_close(projector(blended(both, 0.5)), expected, rtol=0, atol=1e-6)


def test_a_layer_with_fewer_directions_than_others_lends_none_that_it_lacks() -> None:
    found = subspaces(2, 3)
    assert found.further is not None
    further = found.further.clone()
    further[1, 1] = 0
    fewer = Directions(found.vectors, "m", {}, further)
    assert len(fewer.blends(1.0)) == 2
    assert len(fewer.blends(0.0)) == 3
    assert torch.linalg.matrix_rank(blended(fewer, 0.5)) == 3


def test_what_is_spared_at_the_target_is_taken_out_of_every_direction() -> None:
    spared = subspaces(4, 1, seed=8).vectors
    found = subspaces(4, 2, spared=spared)
    for layer in (0.0, 1.4):
        vectors = blended(found, layer, target=3)
        assert (vectors @ spared[3].double()).abs().max() < 1e-7
        plain = blended(found, layer)
        rest = plain - (plain @ spared[3].double())[:, None] * spared[3].double()
        torch.testing.assert_close(vectors, rest, rtol=0, atol=1e-7)
    alone = Directions(spared, "m", {}, spared=spared)
    assert alone.blends(2.0, target=2) == (((2, 1.0),),), "nothing else would be left"


def test_biprojecting_keeps_the_neutral_means_and_leaves_own_layers_as_they_were() -> None:
    behaviour, neutral, _ = planted_residuals(seed=1)
    found = directions_from_residuals(behaviour, neutral, DirectionSettings(biproject=True))
    plain = directions_from_residuals(behaviour, neutral, DirectionSettings())
    assert torch.equal(found.vectors, plain.vectors)
    assert plain.spared is None and found.spared is not None
    mean = torch.nn.functional.normalize(neutral.mean(), dim=-1)
    torch.testing.assert_close(found.spared, mean.float(), rtol=0, atol=1e-6)
    assert (blended(found, 1.0, target=3) @ mean[3]).abs().max() < 1e-6
    torch.testing.assert_close(
        blended(found, 1.0, target=1).float()[0], found.vectors[1], rtol=0, atol=1e-6
    )
