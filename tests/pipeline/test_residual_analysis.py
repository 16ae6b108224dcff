"""Residuals read from files, analysed layer by layer, and the two pages made of them."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch

from ray_abliterate.cli.tables import methods_tables
from ray_abliterate.data.atomic_files import cache_root
from ray_abliterate.directions.comparison.compare import compare_methods
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_views import misplaced_prompts, view_layers
from ray_abliterate.directions.residuals.folds import MOST_PROMPTS, evenly_spaced_indices
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.directions.residuals.shard_files import ShardFolder
from ray_abliterate.errors import RecipeError, RunDirectoryError, ScoreError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import extract
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.residual_analysis import (
    ResidualAnalysis,
    analyse_residuals,
    compare_run,
    methods_to_compare,
)
from ray_abliterate.pipeline.stored_residuals import StoredSet, stored_sets
from ray_abliterate.recipe import DirectionSettings, Recipe
from ray_abliterate.report.directions_page import directions_page
from ray_abliterate.report.pages import write_directions, write_residuals
from ray_abliterate.report.residuals_page import residuals_page
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard
from ray_abliterate.testing.directions import planted_residuals

ROWS = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path / "cache"))


def a_run(path: Path, recipe: Recipe, folder: ShardFolder | None = None, **planted) -> RunDirectory:
    """A run with planted residuals in its files, and no trial."""
    directory = RunDirectory.create(path, recipe, "")
    sets = dict(zip(("behaviour", "neutral"), planted_residuals(0, **planted)[:2], strict=True))
    facts = {}
    for name, residuals in sets.items():
        values = residuals.values.numpy()
        starts = range(0, len(values), ROWS)
        for number, first in enumerate(starts):
            shard = ResidualShard.of(name, first, values[first : first + ROWS])
            file = (folder or directory.shards).file(name, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(shard.to_file(f"key of {name}"))
        facts[name] = {"key": f"key of {name}", "shards": len(starts)}
    layers = residuals.layers
    directory.record_facts(residuals=facts, model={"layers": layers})
    return directory


def finished(directory: RunDirectory) -> None:
    plan = Plan.from_params(
        {"direction_scope": "global", "direction_layer": 2.0, "attn.peak": 1.25,
         "attn.peak_layer": 2.0, "attn.floor": 0.5, "attn.reach": 1.5}, "none",
    )  # fmt: skip
    card = Scorecard((Score("keyword-rate", 0.5, 0, 1), Score("kl-divergence", 0.1, 0, 1)))
    directory.append_trial(Trial(7, plan, card, 1.0))


def figures(html: str) -> list:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


# From files


def test_layers_of_files_are_those_that_were_written(recipe: Recipe, tmp_path: Path) -> None:
    stored = stored_sets(a_run(tmp_path / "run", recipe, prompts=40))
    for found, residuals in zip(stored, planted_residuals(0, prompts=40)[:2], strict=True):
        assert (found.prompts, found.layers) == (len(residuals.values), 4)
        for layer in range(4):
            assert numpy.array_equal(found.layer(layer), residuals.values[:, layer].numpy())


def test_half_precision_comes_back_in_float32() -> None:
    values = numpy.random.default_rng(0).standard_normal((5, 2, 6)).astype(numpy.float32)
    found = StoredSet([ResidualShard.of("behaviour", 0, values, "float16")]).layer(1)
    assert found.dtype == numpy.float32
    assert numpy.array_equal(found, values[:, 1].astype(numpy.float16).astype(numpy.float32))


def test_residuals_that_only_the_cache_has_are_found(recipe: Recipe, tmp_path: Path) -> None:
    folder = ShardFolder(cache_root() / "residuals" / "key of behaviour")
    directory = a_run(tmp_path / "run", recipe, folder, prompts=20)
    with pytest.raises(RunDirectoryError, match="does not hold the residuals of 'neutral'"):
        stored_sets(directory)
    folder.path.rename(folder.path.with_name("key of neutral"))
    folder.path.mkdir()
    for file in folder.path.with_name("key of neutral").glob("behaviour-*"):
        file.rename(folder.path / file.name)
    assert [found.prompts for found in stored_sets(directory)] == [20, 23]


def test_a_run_without_residuals_says_what_to_do(recipe: Recipe, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe, "")
    with pytest.raises(RunDirectoryError, match=r"no residuals yet.\n .* resume "):
        stored_sets(directory)
    facts = {name: {"key": "x", "shards": 1} for name in ("behaviour", "neutral")}
    directory.record_facts(residuals=facts)
    with pytest.raises(
        RunDirectoryError, match=r"does not hold the residuals[\s\S]*directions RECIPE --to"
    ):
        stored_sets(directory)


def test_damaged_missing_and_foreign_files_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    directory = a_run(tmp_path / "run", recipe, prompts=40)
    file = directory.shards.file("behaviour", 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-200] + bytes([whole[-200] ^ 255]) + whole[-199:])
    with pytest.raises(RunDirectoryError, match=r"behaviour-00001.arrow is damaged[\s\S]*--to"):
        stored_sets(directory)
    file.write_bytes(whole)
    foreign = ResidualShard.of("neutral", 16, values(40, 4)[:16]).to_file("another key")
    kept = directory.shards.file("neutral", 1).read_bytes()
    directory.shards.file("neutral", 1).write_bytes(foreign)
    with pytest.raises(RunDirectoryError, match="does not hold the residuals of 'neutral'"):
        stored_sets(directory)
    directory.shards.file("neutral", 1).write_bytes(kept)
    for number in (2, 0):  # also the last one alone, without which all before it fit together
        directory.shards.file("neutral", number).unlink()
        with pytest.raises(RunDirectoryError, match="does not hold the residuals of 'neutral'"):
            stored_sets(directory)
    with pytest.raises(ValueError, match="each prompt once"):
        StoredSet([ResidualShard.of("s", 4, numpy.ones((2, 1, 3), numpy.float32))])


def test_of_several_token_positions_the_one_that_the_directions_are_from_is_read(
    recipe: Recipe, tmp_path: Path
) -> None:
    directory = a_run(tmp_path / "run", recipe, prompts=20, layers=6)
    directory.record_facts(model={"layers": 2})  # three positions of two layers each
    assert numpy.array_equal(stored_sets(directory)[0].layer(1), values(20, 6)[:, 1])
    vectors = torch.nn.functional.normalize(torch.ones(2, 32), dim=1)
    directory.save_directions(Directions(vectors, "m", {"position": "-2"}))
    found = stored_sets(directory)[0]
    assert found.layers == 2
    assert numpy.array_equal(found.layer(1), values(20, 6)[:, 3])


def test_behind_each_position_stand_the_components(recipe: Recipe, tmp_path: Path) -> None:
    """Two positions, each of a stream and two components of two layers."""
    direction = recipe.direction.model_copy(update={"per_component": True, "positions": 2})
    wanted = recipe.model_copy(update={"direction": direction})
    directory = a_run(tmp_path / "run", wanted, prompts=20, layers=12)
    directory.record_facts(model={"layers": 2, "components": ["attn", "mlp"]})
    vectors = torch.nn.functional.normalize(torch.ones(2, 32), dim=1)
    for position, first in ((-1, 0), (-2, 6)):
        directory.save_directions(Directions(vectors, "m", {}).with_position(position))
        for layer in (0, 1):
            found = stored_sets(directory)[0].layer(layer)
            assert numpy.array_equal(found, values(20, 12)[:, first + layer])


def values(prompts: int, layers: int) -> numpy.ndarray:
    found: numpy.ndarray = planted_residuals(0, prompts=prompts, layers=layers)[0].values.numpy()
    return found


# Views


def test_views_hold_a_plane_and_numbers_for_every_layer(recipe: Recipe, tmp_path: Path) -> None:
    stored = stored_sets(a_run(tmp_path / "run", recipe, prompts=40))
    found = list(view_layers(*stored, DirectionSettings()))
    assert [view.layer for view in found] == [0, 1, 2, 3]
    for view in found:
        assert view.components.shape == view.gap.shape == (83, 2)
        assert view.held_out is not None and view.measures["auroc"] > 0.99
        assert len(view.held_out.behaviour) == view.first == 40
        assert view.geometry.gap == pytest.approx(6, abs=1.5)
    for before, after in pairwise(found):
        assert before.components[:, 1] @ after.components[:, 1] >= 0


def test_a_prompt_in_the_wrong_set_is_listed(recipe: Recipe, tmp_path: Path) -> None:
    behaviour, neutral, _ = planted_residuals(0, prompts=40, layers=1)
    one, other = behaviour.values.clone(), neutral.values.clone()
    one[7], other[11] = neutral.values[11], behaviour.values[7]

    class Whole:
        layers = 1

        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def layer(self, index: int) -> numpy.ndarray:
            return self.values[:, index].numpy()

    (found,) = view_layers(Whole(one), Whole(other), DirectionSettings())
    assert {(name, number) for name, number, _ in misplaced_prompts(found)} == {
        ("behaviour", 7),
        ("neutral", 11),
    }
    assert all(0.5 < beyond < 2 for _, _, beyond in misplaced_prompts(found))
    html = residuals_page(ResidualAnalysis((found,), 0, None, {}), "m", "mean-difference").html()
    assert "Prompts that lie with the other set: 2 of 83" in html


def test_of_many_prompts_some_are_picked_at_even_distances() -> None:
    found = evenly_spaced_indices(3 * MOST_PROMPTS)
    assert len(found) == MOST_PROMPTS and (found[0], found[-1]) == (0, 3 * MOST_PROMPTS - 1)
    assert set(numpy.diff(found)) <= {3, 4}
    assert evenly_spaced_indices(5).tolist() == [0, 1, 2, 3, 4]


# Verbs


def test_residuals_are_shown_beside_the_chosen_trials_strengths(
    recipe: Recipe, tmp_path: Path
) -> None:
    directory = a_run(tmp_path / "run", recipe, prompts=40)
    assert analyse_residuals(directory, None, SilentProgress()).trial is None
    finished(directory)
    found = analyse_residuals(directory, None, SilentProgress())
    assert found.trial == 7
    assert found.strengths == {"attn": pytest.approx((0.0, 0.83333, 1.25, 0.83333), abs=1e-4)}
    page = residuals_page(found, "a<b>", "mean-difference")
    written = write_residuals(found, page, tmp_path / "out")
    html = written.read_text("utf-8")
    assert "a&lt;b&gt;: residuals" in html and "<b>:" not in html
    assert "src=" not in html.partition("<script>")[0] and "where trial 7 edits" in html
    shown = figures(html)
    bars = [trace for trace in shown[0]["views"][0]["data"] if trace["type"] == "bar"]
    assert bars[0]["name"] == "attn, strength" and bars[0]["y"] == [0, 0.8333, 1.25, 0.8333]
    stepped = [figure for figure in shown if figure["stepped"]]
    assert [len(figure["views"]) for figure in stepped] == [4, 4, 4]
    points = stepped[0]["views"][2]["data"]
    assert [len(cloud["x"]) for cloud in points] == [40, 43]
    assert points[0]["x"] == pytest.approx(list(found.views[2].components[:40, 0]), rel=1e-3)
    histogram = stepped[2]["views"][2]["data"]
    assert [sum(bars["y"]) for bars in histogram] == pytest.approx([1, 1], abs=1e-3)
    facts = json.loads((tmp_path / "out" / "residuals.json").read_text())
    assert facts["layers"][2]["gap"] == pytest.approx(found.views[2].geometry.gap)
    assert facts["trial"] == 7 and facts["best_layer"] == found.best


def test_a_layer_without_a_direction_is_shown_without_bars(recipe: Recipe, tmp_path: Path) -> None:
    class Same:
        layers = 1

        def layer(self, index: int) -> numpy.ndarray:
            return numpy.ones((4, 6), numpy.float32)

    found = list(view_layers(Same(), Same(), DirectionSettings()))
    assert found[0].held_out is None and found[0].measures["auroc"] == 0.5
    page = residuals_page(ResidualAnalysis(tuple(found), 0, None, {}), "m", "mean-difference")
    assert figures(page.html())[-1]["views"][0]["data"] == []


def test_a_comparison_is_written_as_numbers_and_as_a_page(recipe: Recipe, tmp_path: Path) -> None:
    directory = a_run(tmp_path / "run", recipe, prompts=40)
    methods = methods_to_compare(recipe.direction, ("mean-difference", "whitened", "pca-paired"))
    found = compare_run(directory, methods, 2, SilentProgress())
    page = directions_page(found, "model")
    html = write_directions(found, page, directory.path).read_text("utf-8")
    assert f"Take {found.advice.method}" in html
    assert "pca-paired has no direction here: pca-paired pairs prompts and needs sets" in html
    separation, heat, layers, steady = figures(html)
    assert len(layers["views"][0]["data"][0]["z"]) == 4
    assert [trace["name"] for trace in separation["views"][0]["data"]] == list(found.methods)
    assert heat["views"][1 + found.layer]["data"][0]["z"][0][0] == 1
    assert steady["views"][0]["data"][0]["x"] == [8, 16, 20]
    facts = json.loads((directory.path / "directions.json").read_text())
    assert facts["advice"]["method"] == found.advice.method
    assert facts["separation"]["whitened"][1]["auroc"] == found.separation["whitened"][1]["auroc"]
    tables = methods_tables(found)
    assert [table.row_count for table in tables] == [2, 2, 2]


def test_the_same_comparison_again_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    behaviour, neutral = stored_sets(a_run(tmp_path / "run", recipe, prompts=20))
    methods = methods_to_compare(recipe.direction, ("mean-difference", "inlp"))
    one, other = (compare_methods(behaviour, neutral, methods, 2) for _ in range(2))
    assert one.to_json() == other.to_json()


def test_the_recipes_own_method_keeps_its_options_and_all_share_what_is_spared() -> None:
    settings = DirectionSettings(
        method="whitened", options={"shrinkage": 0.3}, project_out_components=2
    )
    found = methods_to_compare(settings)
    assert len(found) == 13 and next(iter(found)) == "mean-difference"
    assert found["whitened"] == settings
    assert found["inlp"].options == {} and found["inlp"].project_out_components == 2
    own = DirectionSettings(method="tests.support.own_methods:trimmed_difference")
    assert [*methods_to_compare(own)][-1] == "tests.support.own_methods:trimmed_difference"
    with pytest.raises(RecipeError, match=r"--method whitend: .*Did you mean whitened"):
        methods_to_compare(settings, ("whitend",))
    with pytest.raises(ScoreError):
        methods_to_compare(settings, ("no.such:thing",))


def test_residuals_of_the_same_prompts_and_model_are_not_extracted_again(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    directory = a_run(tmp_path / "run", recipe, prompts=20)
    other = recipe.model_copy(update={"direction": DirectionSettings(method="inlp")})
    found = extract(other, "", tmp_path, directory.path, SilentProgress())
    assert found.path == directory.path
    longer = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name": "another"})}
    )
    with pytest.raises(RunDirectoryError, match="not the one"):
        extract(longer, "", tmp_path, directory.path, SilentProgress())


def test_memory_is_bounded_by_a_layer(recipe: Recipe, tmp_path: Path) -> None:
    """Files are mapped: what Arrow itself holds does not grow with the layers."""
    import pyarrow

    stored = stored_sets(a_run(tmp_path / "run", recipe, prompts=64, layers=12, hidden=256))
    before = pyarrow.total_allocated_bytes()
    for layer in range(12):
        torch.from_numpy(stored[0].layer(layer).copy())
    assert pyarrow.total_allocated_bytes() - before < 64 * 256 * 4
