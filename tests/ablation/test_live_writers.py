"""Models that don't fit into memory: weights rest on disk, and hooks edit their layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.errors import ModelError
from ray_abliterate.export.export import export_trial
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.loading import load_model, where_weights_rest
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.search.frontier import Trial
from tests.support.finished_runs import Finished, finish

SOME = "350KB"
"""Of the model's 500: some writers are in memory, some on disk."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, wide_folder: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("plain"), wide_folder)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory, wide_folder: Path) -> Finished:
    held = f'max_memory = {{ cpu = "{SOME}" }}'
    return finish(tmp_path_factory.mktemp("offloaded"), wide_folder, held=held)


def close(one: Trial, other: Trial) -> None:
    assert one.scorecard is not None and other.scorecard is not None
    for first, second in zip(one.scorecard.scores, other.scorecard.scores, strict=True):
        assert first.value == pytest.approx(second.value, rel=1e-4)


def test_a_run_whose_weights_rest_on_disk_scores_as_one_in_memory(
    plain: Finished, offloaded: Finished
) -> None:
    found, all_ = (run.directory.read_environment()["model"] for run in (offloaded, plain))
    assert found["offloaded"] == "disk" and all_["offloaded"] == ""
    assert 0 < found["cache_bytes"] < all_["cache_bytes"]
    assert any("weights rest in disk" in note and "slow" in note for note in found["notes"])
    torch.testing.assert_close(*(run.directory.directions().rows for run in (offloaded, plain)))
    assert offloaded.trial.plan == plain.trial.plan
    close(offloaded.trial, plain.trial)


def test_its_export_has_the_same_bits_and_is_verified_within_a_tolerance(
    plain: Finished, offloaded: Finished, tmp_path: Path
) -> None:
    plain.directory.save_directions(offloaded.directory.directions())
    found, expected = (
        export_trial(run.directory, run.trial, tmp_path / name, SilentProgress(), name == "found")
        for run, name in ((offloaded, "found"), (plain, "expected"))
    )
    name = "model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()
    verification = json.loads((found / "verification.json").read_text())
    assert all(score["within"] for score in verification["scores"])
    assert any("rest in disk were edited by hooks" in reason for reason in verification["reasons"])


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_hooked_offloaded_layers_give_what_edited_ones_give_to_the_last_digits(
    wide_folder: Path, offloaded: Finished, norm: str
) -> None:
    here = load_model(str(wide_folder), ModelSettings(name="x"))[0]
    away = load_model(str(wide_folder), ModelSettings(name="x", max_memory={"cpu": "100KB"}))[0]
    assert where_weights_rest(away) == "disk" and where_weights_rest(here) == ""
    caches = [
        WeightCache(model, find_writers(model, in_memory=model is here)) for model in (here, away)
    ]
    directions, plan = offloaded.directory.directions(), offloaded.trial.plan
    changed = replace(plan, norm=norm)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before = away(ids).logits
        assert torch.equal(before, here(ids).logits)
        with caches[0].edited(changed, directions), caches[1].edited(changed, directions):
            expected, found = here(ids).logits, away(ids).logits
        assert torch.equal(away(ids).logits, before)
    assert (expected - before).norm() > 0.1 * before.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_experts_that_rest_on_disk_are_refused(mixtral_folder: Path) -> None:
    settings = ModelSettings(name="x", max_memory={"cpu": "40KB"})
    model = load_model(str(mixtral_folder), settings)[0]
    writers = find_writers(model, in_memory=False)
    with pytest.raises(ModelError, match=r"down_proj is quantized or offloaded.*experts"):
        WeightCache(model, writers)
