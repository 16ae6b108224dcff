"""Plans with several directions a layer: in place, virtual, behind a norm, sparing, exported."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.export.export import ExportForm, export_trial
from ray_abliterate.model.architecture import find_writers, oriented
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import ModelShape, Plan, Profile
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import FLAGGED, THINGS, Finished, finish

SUBSPACE = """
[direction]
method = "svd-subspace"
options = { rank = 2 }
biproject = true
"""
FAMILIES = ("llama", "gpt2", "qwen3_moe", "gpt_oss", "mamba2", "gemma2")


def subspaces(layers: int, rank: int, hidden: int = 32, seed: int = 0, **more: Any) -> Directions:
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(layers, hidden, rank, generator=random)).Q.mT
    further = basis[:, 1:].contiguous() if rank > 1 else None
    return Directions(basis[:, 0].contiguous(), "random", {}, further, **more)


def per_layer(writers: tuple, norm: str, offset: float | None = None) -> Plan:
    components = sorted({writer.component for writer in writers})
    profile = Profile(1.0, 1.5, 1.0, 100.0)
    return Plan("per-layer", 0.0, norm, tuple((c, profile) for c in components), offset)


def left_along(model: Any, writers: tuple, basis: Any) -> float:
    """The most that any writer still writes along its layer's directions."""
    most = 0.0
    for writer in writers:
        weight = oriented(model.get_parameter(writer.parameter).detach(), writer)
        most = max(most, float((basis(writer) @ weight).abs().max()))
        if writer.bias:
            bias = model.get_parameter(writer.bias).detach()
            most = max(most, float((bias @ basis(writer).T).abs().max()))
    return most


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
@pytest.mark.parametrize("norm", ["none", "column"])
@pytest.mark.parametrize("budget", [None, 0])
def test_nothing_is_left_along_any_direction_and_every_bit_is_back_after(
    family: str, norm: str, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if budget is not None:
        monkeypatch.setattr("ray_abliterate.ablation.planned_edits.PROJECTION_BUDGET_BYTES", budget)
    model = tiny_model(family)
    writers = find_writers(model)
    layers = max(writer.layer for writer in writers) + 1
    found = subspaces(layers, rank=3)
    cache = WeightCache(model, writers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with cache.edited(per_layer(writers, norm), found):
        assert left_along(model, writers, lambda writer: found.basis[writer.layer]) < 5e-5
        assert left_along(model, writers, lambda writer: found.basis[writer.layer - 1]) > 1e-2
    assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())


def test_post_norm_families_lose_every_direction_that_the_stream_sees() -> None:
    model = tiny_model("gemma2")
    writers = find_writers(model)
    found = subspaces(4, rank=2)
    with WeightCache(model, writers).edited(per_layer(writers, "none"), found):
        writer = writers[0]
        norm = model.get_submodule(writer.post_norm or "")
        weight = oriented(model.get_parameter(writer.parameter), writer)[0].detach()
        seen = norm((weight @ torch.randn(weight.shape[1], 5)).T).detach()
    assert (seen @ found.basis[writer.layer].T).abs().max() < 1e-5 * seen.norm()


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_virtual_edits_of_subspaces_give_the_scores_of_edited_weights(
    norm: str, planted_run: Any
) -> None:
    from ray_abliterate.data.prompts import PromptSet

    sets = {
        "keyword-rate": PromptSet.of("k", *(f"tell me about the old {w}" for w in FLAGGED)),
        "kl-divergence": PromptSet.of("n", *(f"tell me about the old {w}" for w in THINGS)),
    }
    made = Replica(planted_run.directory.read_recipe(), str(planted_run.model), sets)
    known = planted_run.directory.directions()
    random = torch.randn(known.layers, 32, generator=torch.Generator().manual_seed(3))
    other = random - (random * known.vectors).sum(-1, keepdim=True) * known.vectors
    lead = torch.nn.functional.normalize(other, dim=-1)  # the behaviour is along the second one
    setup = TrialSetup(Directions(lead, "m", {}, known.vectors[:, None]))
    shape = made.describe().shape
    tried = [Plan.uniform(shape, 2.5, norm, strength) for strength in (0.3, 1.0)]
    tried.append(Plan("per-layer", 0.0, norm, tried[0].profiles))
    alone = [made.evaluate(plan, setup) for plan in tried]
    together = made.evaluate_in_shared_passes(tried, setup)
    base = made.evaluate(Plan.nothing(), setup)
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(other, Exception), other
        assert other.scorecard["keyword-rate"] == one.scorecard["keyword-rate"]
        kl = one.scorecard["kl-divergence"].value
        assert other.scorecard["kl-divergence"].value == pytest.approx(kl, rel=1e-3, abs=1e-7)
    if norm != "column":  # there the noise that is left gets the norm of what was taken out
        rates = [e.scorecard["keyword-rate"].value for e in (base, alone[1])]
        assert rates == [1.0, 0.0], "the second direction is not taken out"


def test_projections_of_other_further_directions_are_not_taken_for_these() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    one, cache = subspaces(4, rank=2), WeightCache(model, writers)
    other = subspaces_like(one)
    with cache.edited(per_layer(writers, "none"), one):
        first = copy.deepcopy(model.state_dict())
    with cache.edited(per_layer(writers, "none"), other):
        assert left_along(model, writers, lambda writer: other.basis[writer.layer]) < 5e-5
        name = writers[0].parameter
        assert not torch.equal(model.get_parameter(name), first[name])
    assert TrialSetup(one).key != TrialSetup(other).key


def subspaces_like(found: Directions) -> Directions:
    """The same first directions with others beside them."""
    random = torch.randn(found.layers, 1, 32, generator=torch.Generator().manual_seed(9))
    lead = found.vectors[:, None]
    rest = random - (random * lead).sum(-1, keepdim=True) * lead
    return Directions(found.vectors, "m", {}, torch.nn.functional.normalize(rest, dim=-1))


def test_a_plan_takes_directions_from_another_layer_than_it_edits() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    found, cache = subspaces(4, rank=1), WeightCache(model, writers)
    with cache.edited(per_layer(writers, "none", offset=1.0), found):
        above = [min(layer + 1, 3) for layer in range(4)]
        assert left_along(model, writers, lambda w: found.basis[above[w.layer]]) < 5e-5
        assert left_along(model, writers, lambda w: found.basis[w.layer]) > 1e-2
    with cache.edited(per_layer(writers, "none", offset=-0.5), found):
        between = [found.at(max(layer - 0.5, 0.0))[None] for layer in range(4)]
        assert left_along(model, writers, lambda w: between[w.layer]) < 5e-5


def test_a_direction_used_elsewhere_spares_the_neutral_mean_there() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    spared = subspaces(4, rank=1, seed=5).vectors
    found, cache = subspaces(4, rank=2, spared=spared), WeightCache(model, writers)
    before = {w.parameter: model.get_parameter(w.parameter).detach().clone() for w in writers}
    shape = ModelShape(4, 32, tuple(sorted({w.component for w in writers})))
    with cache.edited(Plan.uniform(shape, 2.0, "none"), found):
        for writer in writers:
            mean = spared[writer.layer]
            old, new = (
                oriented(m, writer)[0]
                for m in (before[writer.parameter], model.get_parameter(writer.parameter).detach())
            )
            torch.testing.assert_close(mean @ new, mean @ old, rtol=0, atol=1e-5)
            rest = found.basis[2] - (found.basis[2] @ mean)[:, None] * mean
            assert (rest @ new).abs().max() < 1e-4
            assert (found.basis[2] @ old).abs().max() > 1e-2


@pytest.fixture(scope="module")
def subspace_run(tmp_path_factory: pytest.TempPathFactory, planted_folder: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("subspace-run"), planted_folder, more=SUBSPACE)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_of_two_directions_that_spare_the_neutral_mean_is_verified(
    kind: str, subspace_run: Finished, tmp_path: Path
) -> None:
    directory, form = subspace_run.directory, ExportForm.of(kind, None, 1e-6)
    directions = directory.directions()
    assert directions is not None and directions.rank == 2 and directions.spared is not None
    to = export_trial(directory, subspace_run.trial, tmp_path / "out", SilentProgress(), form=form)
    scores = json.loads((to / "verification.json").read_text())["scores"]
    assert scores and all(score["within"] for score in scores)
    assert ", up to 2 per layer" in (to / "README.md").read_text()
    if kind == "adapter":
        config = json.loads((to / "adapter_config.json").read_text())
        assert (config["r"], config["use_dora"]) == (2, True)
