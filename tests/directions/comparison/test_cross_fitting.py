"""Layers are measured on prompts that their directions were not found from, shard by shard."""

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from ray_abliterate.directions.comparison import cross_fitting
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.layer_separation import best_layer
from ray_abliterate.directions.residuals.folds import Folds, evenly_spaced_indices
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.directions.separability import auroc, measure_separability
from ray_abliterate.recipe import DirectionSettings
from tests.directions.test_layers import of_sets

METHODS = ("mean-difference", "variance-scaled", "whitened", "geometric-median")
NAMES = ("auroc", "fisher", "silhouette", "mutual_information")


def noise(prompts: int, layers: int, hidden: int, seed: int = 0) -> list[Residuals]:
    """Two sets that differ by nothing but chance, about a mean."""
    random = torch.Generator().manual_seed(seed)
    return [Residuals(torch.randn(prompts, layers, hidden, generator=random) + 1) for _ in "bn"]


def rows_of(sets: Sequence[Residuals], method: str, texts: Any = None, **more: Any) -> list[Any]:
    settings = DirectionSettings(method=method, **more)
    shards, _ = of_sets(sets, texts)
    return shards.separation(shards.directions(settings), settings)


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_separates_noise_however_many_units_there_are(method: str) -> None:
    sets = noise(20, 16, 400, seed=3)
    found = directions_from_residuals(*sets, DirectionSettings(method=method)).vectors
    for layer in range(16):  # along their own directions they are told apart entirely
        along = [s.values[:, layer].numpy() @ found[layer].numpy() for s in sets]
        assert auroc(*along) > 0.99
    rows = rows_of(sets, method)
    areas = [row["auroc"] for row in rows]
    assert numpy.mean(areas) == pytest.approx(0.5, abs=0.1)
    assert max(areas) < 0.9
    assert max(row["silhouette"] for row in rows) < 0.5
    assert numpy.mean([row["mutual_information"] for row in rows]) < 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by", NAMES)
def test_the_layer_with_the_behaviour_is_found_among_layers_of_noise(method: str, by: str) -> None:
    sets = noise(30, 10, 300, seed=1)
    sets[0].values[:, 4, 7] += 7.0
    rows = rows_of(sets, method)
    assert best_layer(rows, by) == 4
    assert rows[4]["auroc"] > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_each_fold_is_measured_along_the_direction_of_all_other_prompts(
    method: str, quantile: float
) -> None:
    sets = noise(13, 3, 40)
    sets[0].values[:, :, 2] += 2.0
    rows = rows_of(sets, method, winsorize_quantile=quantile)
    settings = DirectionSettings(method=method, winsorize_quantile=quantile)
    folds = Folds.of(range(13), range(20, 33))
    assert folds is not None and folds.count == 5
    along = [numpy.empty((13, 3)) for _ in "bn"]
    for fold in range(5):
        others = [
            Residuals(s.values[side != fold]) for s, side in zip(sets, folds.sides, strict=True)
        ]
        vectors = directions_from_residuals(*others, settings).vectors.double().numpy()
        parts = []
        for s, side in zip(sets, folds.sides, strict=True):
            own = s.winsorized(quantile).values[side == fold].double().numpy()
            parts.append(numpy.einsum("plh,lh->pl", own, vectors))
        middle = 0.5 * (parts[0].mean(axis=0) + parts[1].mean(axis=0))
        for whole, side, part in zip(along, folds.sides, parts, strict=True):
            whole[side == fold] = part - middle
    for layer, row in enumerate(rows):
        expected = measure_separability(along[0][:, layer], along[1][:, layer])
        for name in NAMES:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_what_prompts_say_twice_is_not_measured_along_itself() -> None:
    """Every prompt four times: dealt by place alone, each fold would know all of the others'."""
    plain = noise(11, 12, 400, seed=5)
    sets = [Residuals(s.values.repeat(4, 1, 1)) for s in plain]
    texts = [[f"{name} {i % 11}" for i in range(44)] for name in "bn"]
    blind = numpy.mean([row["auroc"] for row in rows_of(sets, "mean-difference", texts)])
    leaking = numpy.mean([row["auroc"] for row in rows_of(sets, "mean-difference")])
    assert blind == pytest.approx(0.5, abs=0.15) and leaking > 0.95
    spaced = [[text.upper() + "  " if i % 2 else text for i, text in enumerate(own)]
              for own in texts]  # fmt: skip
    same = rows_of(sets, "mean-difference", spaced)
    assert numpy.mean([row["auroc"] for row in same]) == blind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompts", [2, 3, 4])
def test_fewer_prompts_than_folds_are_measured_in_as_many_folds(method: str, prompts: int) -> None:
    sets = noise(prompts, 4, 30)
    sets[0].values[:, 1, 2] += 50.0
    rows = rows_of(sets, method)
    assert best_layer(rows) == 1 and rows[1]["auroc"] == 1.0


@pytest.mark.parametrize("method", ["mean-difference", "geometric-median"])
def test_a_set_of_one_prompt_cannot_be_held_out_and_the_means_decide(method: str) -> None:
    sets = noise(8, 5, 30)
    sets[0] = Residuals(sets[0].values[:1])
    sets[0].values[:, 2, 3] += 40.0
    rows = rows_of(sets, method)
    assert {row["auroc"] for row in rows} == {0.5} and {row["fisher"] for row in rows} == {0.0}
    assert best_layer(rows) == best_layer(rows, "auroc") == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_difference_hangs_on_one_fold_tells_nothing(method: str) -> None:
    """Without that fold the sets are the same there; in all layers, none is measured."""
    same = noise(10, 2, 30)[0]
    for layers in (slice(0, 1), slice(0, 2)):
        other = same.values.clone()
        other[:, 1] += 3.0
        other[:, layers] = same.values[[1, 0, *range(2, 10)], layers]
        other[4, layers] += 1.0
        rows = rows_of([Residuals(other), same], method)
        assert rows[0]["auroc"] == 0.5 and rows[0]["fisher"] == 0.0
        assert (rows[1]["auroc"] == 0.5) == (layers.stop == 2)


def test_paired_prompts_are_left_out_together() -> None:
    sets = noise(11, 3, 40)
    sets[0].values[:, 1, 5] += 6.0
    texts = [[f"b {i}" for i in range(11)], [f"n {i // 2}" for i in range(11)]]
    rows = rows_of(sets, "pca-paired", texts)
    assert best_layer(rows) == 1 and rows[1]["auroc"] > 0.9


def test_of_a_method_that_wants_residuals_no_more_are_here_than_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        cross_fitting, "evenly_spaced_indices", lambda count: evenly_spaced_indices(count, 12)
    )
    sets = noise(50, 2, 20)
    sets[0].values[:, 1, 3] += 5.0
    settings = DirectionSettings(method="geometric-median")
    shards, _ = of_sets(sets)
    directions = shards.directions(settings)
    few = [Residuals(s.values[evenly_spaced_indices(50, 12)]) for s in sets]
    expected = rows_of(few, "geometric-median")
    for row, other in zip(shards.separation(directions, settings), expected, strict=True):
        assert [row[name] for name in NAMES] == pytest.approx([other[name] for name in NAMES])
        assert row["behaviour_norm"] != other["behaviour_norm"], "means are those of all prompts"
