"""Directions of components: what each adds to the stream, and edits of each with its own."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.export.export import ExportForm, export_trial
from ray_abliterate.model.architecture import find_blocks, find_writers, oriented
from ray_abliterate.model.component_outputs import capture_outputs, component_modules, stack_outputs
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.pipeline import extraction
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.stored_residuals import stored_sets
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import FLAGGED, THINGS, Finished, finish

COMPONENTS = "[direction]\nper_component = true\n"
FAMILIES = ("llama", "gpt2", "gemma2", "olmo2", "mixtral", "gpt_oss", "mamba2")
PROMPTS = tuple(Prompt(f"tell me about the old {word}") for word in ("cake", "river", "stone"))


@pytest.fixture(scope="module")
def found(tmp_path_factory, planted_folder) -> Finished:
    folder = tmp_path_factory.mktemp("components")
    return finish(folder, planted_folder, norm="none", more=COMPONENTS)


@pytest.fixture
def behaviour_sets() -> dict[str, PromptSet]:
    """What the recipe's scorers ask."""
    words = {"keyword-rate": FLAGGED[4:], "kl-divergence": THINGS[4:]}
    return {name: PromptSet.of(name, *(f"tell me about the old {word}" for word in own))
            for name, own in words.items()}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_its_components_add_and_nothing_else(family: str) -> None:
    model = tiny_model(family, layers=3)
    writers = find_writers(model)
    components = sorted({writer.component for writer in writers})
    modules = component_modules(model, writers, 3)
    assert len(modules) == 3 * len(components)
    _, blocks = find_blocks(model)
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))

    def take(hidden: Any) -> Any:
        return hidden.reshape(2, -1, hidden.shape[-1])[:, -1]

    with torch.no_grad(), capture_outputs([*blocks, *modules], take) as outputs:
        model(ids, use_cache=False)
    values = stack_outputs(outputs)
    stream, parts = values[:, :3], values[:, 3:].unflatten(1, (len(components), 3))
    for layer in (1, 2):
        added = parts[:, :, layer].sum(dim=1)
        torch.testing.assert_close(
            stream[:, layer] - stream[:, layer - 1], added, rtol=1e-4, atol=1e-4
        )


def test_experts_one_by_one_are_refused_and_absent_components_add_nothing() -> None:
    model = tiny_model("mixtral", layers=2)
    writers = find_writers(model)
    (first, *_) = [w for w in writers if w.component == "experts"]
    elsewhere = type(first)(0, "experts", writers[0].parameter, 0, None, None)
    with pytest.raises(ModelError, match=r"layer 0 has 2 writers of 'experts'[\s\S]*= false"):
        component_modules(model, [*writers, elsewhere], 2)
    dense = [w for w in writers if (w.component, w.layer) != ("experts", 0)]
    modules = component_modules(model, dense, 2)
    assert [place is None for place in modules] == [False, False, True, False]
    one = torch.ones(4, 8)
    assert torch.equal(stack_outputs([one, None])[:, 1], torch.zeros(4, 8))


@pytest.mark.parametrize("engine", [True, False])
def test_contributions_come_after_the_stream_on_either_path(
    engine: bool, planted_folder: Path, found: Finished
) -> None:
    replica = Replica(found.directory.read_recipe(), str(planted_folder), {})
    model = replica.model
    if not engine:
        model._engine = None
    plain = model.residuals(PROMPTS)
    modules = component_modules(model.module, find_writers(model.module), 4)
    values = model.residuals(PROMPTS, components=modules)
    assert values.shape == (3, 12, 32)
    torch.testing.assert_close(values[:, :4], plain, rtol=1e-5, atol=1e-5)
    attn, mlp = values[:, 4:8], values[:, 8:]
    for layer in range(1, 4):
        torch.testing.assert_close(
            plain[:, layer] - plain[:, layer - 1], attn[:, layer] + mlp[:, layer],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    assert not any(module._forward_hooks for module in model.module.modules())


def test_the_component_that_carries_the_behaviour_has_the_planted_direction(
    found: Finished,
) -> None:
    directions, r = found.directory.directions(), planted_axes()[0]
    assert set(directions.components) == {"attn", "mlp"}
    attn, mlp = directions.for_component("attn"), directions.for_component("mlp")
    assert float(attn.vectors[PLANTED_LAYER] @ r) > 0.999
    assert abs(float(mlp.vectors[PLANTED_LAYER] @ r)) < 0.9
    assert directions.for_component("mixer") is directions
    assert torch.equal(directions.vectors, Directions.from_bytes(directions.to_bytes()).vectors)
    assert len(found.directory.baseline().separation) == 4


def test_edits_with_their_own_directions_take_the_behaviour_out_in_place_and_virtually(
    found: Finished, planted_folder: Path, behaviour_sets: Any
) -> None:
    """A contribution is a layer's own: of the planted model's, one layer's alone carries it."""
    replica = Replica(found.directory.read_recipe(), str(planted_folder), behaviour_sets)
    setup, shape = TrialSetup(found.directory.directions()), replica.describe().shape
    uniform = [Plan.uniform(shape, layer, "none") for layer in (2.0, 3.0)]
    plans = [*uniform, Plan("per-layer", 0.0, "none", uniform[0].profiles)]
    alone = [replica.evaluate(plan, setup).scorecard for plan in plans]
    assert [card["keyword-rate"].value for card in alone] == [0.0, 1.0, 0.0]
    together = replica.evaluate_in_shared_passes(plans, setup)
    for card, other in zip(alone, together, strict=True):
        assert not isinstance(other, Exception), other
        assert other.scorecard["keyword-rate"] == card["keyword-rate"]
        kl = card["kl-divergence"].value
        assert other.scorecard["kl-divergence"].value == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_each_writer_is_edited_along_its_own_direction(
    found: Finished, planted_folder: Path
) -> None:
    model = LanguageModel.load(str(planted_folder), found.directory.read_recipe().model).module
    writers, directions = find_writers(model), found.directory.directions()
    cache = WeightCache(model, writers)
    shape = Replica(found.directory.read_recipe(), str(planted_folder), {}).describe().shape
    stream = Directions(directions.vectors, directions.method, directions.origin)
    cases = [(directions, 2.0), (stream, 2.0), (directions, 2.0), (directions, 2.5)]
    for given, layer in cases:  # products of others are not taken
        with cache.edited(Plan.uniform(shape, layer, "none"), given):
            for writer in writers:
                weight = oriented(model.get_parameter(writer.parameter).detach(), writer)
                own, general = given.for_component(writer.component).at(layer), given.at(layer)
                assert (own @ weight).abs().max() < 1e-4
                if writer.component == "mlp" and given is not stream:
                    assert (general @ weight).abs().max() > 1e-2


def test_directions_of_components_survive_their_file_and_tell_setups_apart(
    found: Finished,
) -> None:
    directions = found.directory.directions()
    again = Directions.from_bytes(directions.to_bytes())
    assert again.components.keys() == directions.components.keys()
    for name, own in directions.components.items():
        assert torch.equal(again.components[name].rows, own.rows)
    stream = directions.with_components({})
    swapped = directions.with_components(
        dict(
            zip(
                ("mlp", "attn"), (directions.for_component(n) for n in ("attn", "mlp")), strict=True
            )
        )
    )
    keys = {TrialSetup(one).key for one in (directions, again, stream, swapped)}
    assert len(keys) == 3
    assert stream.bits() == directions.rows.numpy().tobytes()


@pytest.mark.parametrize(
    "method", ["variance-scaled", "whitened", "geometric-median", "svd-subspace"]
)
def test_every_kind_of_method_finds_them(
    method: str, planted_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = f'{COMPONENTS}method = "{method}"\nbiproject = true\n'
    with caplog.at_level(logging.WARNING):
        run = finish(tmp_path, planted_folder, norm="none", more=more)
    directions = run.directory.directions()
    for name in ("attn", "mlp"):
        own = directions.for_component(name)
        assert own.vectors.shape == (4, 32) and own.spared is not None
        assert (own.rank > 1) == (directions.rank > 1) == (method == "svd-subspace")
    again = Directions.from_bytes(directions.to_bytes())
    assert again.bits() == directions.bits()


def test_shards_with_contributions_are_others_and_the_streams_are_the_same(
    found: Finished, planted_folder: Path, tmp_path: Path
) -> None:
    plain = finish(tmp_path, planted_folder, norm="none")
    one, other = (
        r.directory.read_environment()["residuals"]["behaviour"]["key"] for r in (plain, found)
    )
    assert one != other
    torch.testing.assert_close(
        plain.directory.directions().vectors, found.directory.directions().vectors,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert plain.directory.residuals("behaviour").layers == 4
    assert found.directory.residuals("behaviour").layers == 12


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_is_the_trial(kind: str, found: Finished, tmp_path: Path) -> None:
    form = ExportForm.of(kind, None, 1e-6)
    to = export_trial(found.directory, found.trial, tmp_path / "out", SilentProgress(), form=form)
    scores = json.loads((to / "verification.json").read_text())["scores"]
    assert scores and all(score["within"] for score in scores)
    assert "found separately for each component" in (to / "README.md").read_text()
    if kind == "merged":
        exported = LanguageModel.load(str(to), found.directory.read_recipe().model).module
        own = found.directory.directions().for_component("mlp").at(found.trial.plan.direction_layer)
        for writer in find_writers(exported):
            if writer.component == "mlp":
                weight = oriented(exported.get_parameter(writer.parameter).detach(), writer)
                assert (own @ weight).abs().max() < 1e-5


def test_contributions_of_every_position_stand_behind_the_stream_there(
    planted_folder: Path, found: Finished
) -> None:
    """Read at the ends of shorter prompts, which the model can't tell from these."""
    model = Replica(found.directory.read_recipe(), str(planted_folder), {}).model
    modules = component_modules(model.module, find_writers(model.module), 4)
    more = tuple(model.chat.opening("Sorry"))
    model.response_prefix = more * 2
    values = model.residuals(PROMPTS, 2, modules).unflatten(1, (2, 3, 4))
    for place, shorter in enumerate((more * 2, more)):
        model.response_prefix = shorter
        alone = model.residuals(PROMPTS, components=modules).unflatten(1, (3, 4))
        torch.testing.assert_close(values[:, place], alone, rtol=1e-5, atol=1e-5)


def test_a_run_with_components_at_several_positions_edits_with_those_of_the_chosen_one(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"{COMPONENTS}positions = 2\n"
    with pytest.raises(ModelError, match=r"positions = 2, but prompts end with 1 tokens"):
        finish(tmp_path / "short", planted_folder, norm="none", more=more)

    def prefix(context: Any, sets: Any) -> tuple[int, ...]:
        tokens = tuple(context.pool.replica.model.chat.opening("cloud"))
        context.directory.record_facts(response_prefix=list(tokens))
        return tokens

    monkeypatch.setattr(extraction, "response_prefix", prefix)
    more += "project_out_neutral = false\n"
    done = finish(tmp_path / "long", planted_folder, norm="none", more=more)
    directions, directory = done.directory.directions(), done.directory
    assert set(directions.components) == {"attn", "mlp"}
    assert directory.residuals("behaviour").layers == 24
    back = -1 - int(directions.origin["position"])
    behaviour, neutral = (directory.residuals(name).mean() for name in ("behaviour", "neutral"))
    gap = (behaviour - neutral).unflatten(0, (2, 3, 4))[back]
    parts = (directions, directions.for_component("attn"), directions.for_component("mlp"))
    for number, own in enumerate(parts):
        for layer in (2, 3):
            if own.usable[layer]:
                along = own.vectors[layer].double() @ gap[number, layer]
                assert along == pytest.approx(float(gap[number, layer].norm()), rel=1e-3)
    assert directions.usable[2] and directions.for_component("attn").usable[2]
    stored = stored_sets(directory)[0]
    mean = torch.from_numpy(stored.layer(3)).double().mean(0)
    torch.testing.assert_close(mean, behaviour.unflatten(0, (2, 3, 4))[back, 0, 3])
