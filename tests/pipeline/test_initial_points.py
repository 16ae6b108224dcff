"""What each layer's direction does, on the planted model: against transformers' own passes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_abliterate.cluster.tune_search import TuneSearch
from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.errors import SearchError
from ray_abliterate.pipeline import run
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.extraction import extract, find_directions
from ray_abliterate.pipeline.initial_points import (
    MOST_PROMPTS,
    effect_prompts,
    initial_points,
    try_layers,
)
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.pipeline.search_stage import search
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi
from ray_abliterate.replica.replica import Replica
from ray_abliterate.report.report import build_report
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.space import SearchSpace
from tests.support.finished_runs import FLAGGED, THINGS, InProcessPool
from tests.support.run_contexts import run_context

RECIPE = """
[model]
name = "{model}"
[prompts]
behaviour = {{ file = "behaviour.txt", split = "[:5]" }}
neutral = {{ file = "neutral.txt", split = "[:5]" }}
[search]
trials = 3
seeds = "{seeds}"
[[scorers]]
kind = "refusal-log-odds"
goal = "report"
openings = ["Sorry"]
prompts = {{ file = "behaviour.txt", split = "[5:]" }}
[[scorers]]
kind = "kl-divergence"
prompts = {{ file = "neutral.txt", split = "[5:]" }}
[run]
batch_size = 2
residual_cache = false
"""


def meaningless() -> torch.Tensor:
    """Directions that nothing reads, for the layers below the planted one."""
    drawn = torch.randn(PLANTED_LAYER, 32, generator=torch.Generator().manual_seed(3))
    for axis in planted_axes():
        drawn -= (drawn @ axis)[:, None] * axis
    return torch.nn.functional.normalize(drawn, dim=-1)


class Layers(InProcessPool):
    """Counts layers that are tried, and may give them in another order."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self.tried: list[int] = []
        self.backwards = False

    def map(self, method: Any, calls: Any, *rest: Any, **more: Any) -> Iterator[Any]:
        given = list(reversed(list(calls)) if self.backwards else calls)
        self.tried += (
            [layer for _, layer, *_ in given] if method is ReplicaApi.direction_effect else []
        )
        yield from super().map(method, given, *rest, **more)


class RecordingProgress(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Started:
    """A run that has its directions and its baseline."""

    def __init__(self, folder: Path, model: Path, seeds: str = "log-odds") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, words in (("behaviour", FLAGGED), ("neutral", THINGS)):
            lines = "".join(f"tell me about the old {word}\n" for word in words)
            (folder / f"{name}.txt").write_text(lines)
        text = RECIPE.format(model=model, seeds=seeds)
        self.recipe = Recipe.parse(text, "recipe.toml")
        self.directory = RunDirectory.create(folder / "run", self.recipe, text)
        self.base, self.progress, self.model = folder, RecordingProgress(), model
        self.sets = load_prompts(self.recipe, self.directory, folder, self.progress)
        self.pool = Layers(Replica(self.recipe, str(model), self.sets.scored))
        self.context = run_context(self.directory, self.pool, self.recipe, self.progress, folder)
        record_environment(self.context)
        found, self.shards = find_directions(self.context, self.sets)
        # blocks below the planted one leave the same at the last token; here they have directions
        vectors = found.directions.vectors.clone()
        vectors[:PLANTED_LAYER] = meaningless()
        self.setup = replace(found, directions=replace(found.directions, vectors=vectors))

    def try_layers(self) -> Any:
        try_layers(self.context, self.sets.scored, self.setup, self.shards)
        return self.directory.selection()

    def measure(self) -> Any:
        return run.measure_baseline(
            self.context, self.setup, self.pool.put(self.setup), self.shards
        )

    def points(self, recipe: Recipe | None = None) -> tuple[dict[str, Any], ...]:
        recipe = recipe or self.recipe
        space = SearchSpace.of(self.pool.facts.shape, recipe.search.space, "none")
        base = self.directory.baseline()
        return initial_points(replace(self.context, recipe=recipe), space, base)


@pytest.fixture(scope="module")
def tried(tmp_path_factory, planted_folder) -> Started:
    started = Started(tmp_path_factory.mktemp("tried"), planted_folder)
    started.measure()
    started.try_layers()
    return started


def odds(logits: torch.Tensor, token: int) -> float:
    p = logits.double().softmax(-1)
    return float((p[:, token].log() - (1 - p[:, token]).log()).mean())


@torch.no_grad()
def reference(started: Started, layer: int) -> tuple[float, float, float]:
    """The three numbers from transformers' own passes, one prompt at a time."""
    module: Any = AutoModelForCausalLM.from_pretrained(started.model)
    chat, prompts = (
        started.pool.replica.model.chat,
        effect_prompts(started.recipe, started.sets.scored),
    )
    v = started.setup.directions.vectors[layer]
    (sorry,) = chat.opening("Sorry")

    def logits(prompts: Any) -> torch.Tensor:
        rows = [torch.tensor([chat.encode(prompt)]) for prompt in prompts]
        return torch.stack([module(row).logits[0, -1] for row in rows])

    base = logits(prompts.neutral).double().log_softmax(-1)
    means = [
        started.shards.gathered(s).values[:, layer].double().mean(0)
        for s in (started.sets.behaviour, started.sets.neutral)
    ]
    gap = float((means[0] - means[1]) @ v.double())
    block = module.model.layers[layer]
    handle = block.register_forward_hook(
        lambda _m, _a, out: out + gap * v if torch.is_tensor(out) else (out[0] + gap * v, *out[1:])
    )
    more = logits(prompts.neutral)
    handle.remove()
    for name, weight in module.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight -= torch.outer(v, v @ weight)
    less = logits(prompts.neutral).double().log_softmax(-1)
    moved = float((base.exp() * (base - less)).sum(-1).mean())
    return odds(logits(prompts.behaviour), sorry), odds(more, sorry), moved


@pytest.mark.parametrize("layer", range(4))
def test_a_layers_numbers_are_those_of_plain_passes(tried: Started, layer: int) -> None:
    found = tried.directory.selection().scores[layer]
    expected = reference(tried, layer)
    assert found.layer == layer
    numbers = (found.ablated, found.added, found.divergence)
    assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_layer_that_carries_the_behaviour_is_chosen_and_one_that_does_not_is_rejected(
    tried: Started,
) -> None:
    found = tried.directory.selection()
    assert found.chosen.layer >= PLANTED_LAYER
    assert found.chosen.ablated < 0 < found.chosen.base[0] and found.chosen.base[1] < 0
    for one in found.scores[:PLANTED_LAYER]:
        assert one.rejection == "adding it does not cause refusals"
        assert one.ablated == pytest.approx(one.base[0], abs=0.5)
    assert tried.pool.tried == [0, 1, 2, 3]
    assert found.sentence() in tried.progress.notes


def test_the_model_is_the_base_model_again_and_its_learning_is_kept(
    tried: Started, planted_folder: Path
) -> None:
    replica = Replica(tried.recipe, str(planted_folder), {})
    before = {name: value.clone() for name, value in replica.model.module.state_dict().items()}
    prompts = tried.sets.scored["kl-divergence"].prompts
    logits = replica.model.next_token_logits(prompts)
    known = dict(replica.model._stored_batches)
    held_out = effect_prompts(tried.recipe, tried.sets.scored)
    first = replica.direction_effect(held_out, 2, 3.0, tried.setup)
    assert replica.direction_effect(held_out, 2, 3.0, tried.setup) == first
    assert torch.equal(replica.model.next_token_logits(prompts), logits)
    for name, value in replica.model.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert replica.model._stored_batches == known and known
    assert not any(block._forward_hooks for block in replica.model.blocks)


def test_the_plain_path_gives_the_same(tried: Started) -> None:
    replica = Replica(tried.recipe, str(tried.model), {})
    replica.model._engine = None
    prompts = effect_prompts(tried.recipe, tried.sets.scored)
    gap = tried.directory.baseline().separation[2]["gap"]
    one, other = (
        r.direction_effect(prompts, 2, gap, tried.setup) for r in (replica, tried.pool.replica)
    )
    for name in ("ablated", "added", "divergence"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4)


def test_a_layer_that_breaks_the_model_is_rejected_and_says_why(tried: Started) -> None:
    prompts = effect_prompts(tried.recipe, tried.sets.scored)
    broken = tried.pool.replica.direction_effect(prompts, 2, float("inf"), tried.setup)
    assert broken.ablated is None
    assert broken.rejection == "the model's logits are NaN: the edit has broken it"
    assert tried.pool.replica.direction_effect(prompts, 2, 1.0, tried.setup).ablated is not None


def test_layers_may_be_tried_in_any_order_and_are_tried_once(
    tried: Started, planted_folder: Path, tmp_path: Path
) -> None:
    other = Started(tmp_path, planted_folder)
    other.pool.backwards = True
    found = other.try_layers()  # without a baseline: from the shards
    assert found.scores == tried.directory.selection().scores
    assert other.pool.tried == [3, 2, 1, 0]
    other.try_layers()
    assert len(other.pool.tried) == 4
    vectors = other.setup.directions.vectors.flip(0).contiguous()
    other.setup = run.TrialSetup(type(other.setup.directions)(vectors, "turned", {}))
    assert other.try_layers().method == "turned" and len(other.pool.tried) == 8


def test_the_first_plan_takes_the_chosen_layer(tried: Started) -> None:
    chosen = tried.directory.selection().chosen.layer
    wide = tried.recipe.search.space.model_copy(update={"direction_layer": (0.0, 1.0)})
    search_settings = tried.recipe.search.model_copy(update={"space": wide})
    first, middle = tried.points(tried.recipe.model_copy(update={"search": search_settings}))
    assert (first["direction_scope"], first["direction_layer"]) == ("global", chosen)
    assert middle["direction_layer"] == 1.5
    facts = {"by": "log-odds", "layer": chosen, "taken": chosen}
    assert tried.directory.read_environment()["seeds"] == facts


def test_without_a_layer_that_passes_the_one_that_separates_best_is_taken(
    tried: Started, planted_folder: Path, tmp_path: Path
) -> None:
    other = Started(tmp_path, planted_folder)
    other.measure()
    found = other.try_layers()
    none = type(found)(found.key, found.method, found.layers, found.scores[:PLANTED_LAYER])
    other.directory.save_selection(none)
    first, _ = other.points()
    assert (
        other.directory.read_environment()["seeds"]["layer"]
        == other.directory.baseline().best_layer
    )
    assert "no layer's direction passes" in other.progress.notes[-1]
    assert first["direction_layer"] >= 0.4 * 3


def test_where_no_layer_could_be_measured_it_is_said(tried: Started) -> None:
    base = tried.directory.baseline()
    rows = [{**row, "fisher": 0.0, "auroc": 0.5} for row in base.separation]
    lengths = [row["behaviour_norm"] + row["neutral_norm"] for row in rows]
    farthest = max(rows, key=lambda row: row["direction_norm"] / lengths[int(row["layer"])])
    space = SearchSpace.of(tried.pool.facts.shape, tried.recipe.search.space, "none")
    settings = tried.recipe.search.model_copy(update={"seeds": "auroc"})
    recipe = tried.recipe.model_copy(update={"search": settings})
    context = replace(tried.context, recipe=recipe)
    told = tried.progress.notes
    told.clear()
    initial_points(context, space, replace(base, separation=tuple(rows)))
    assert tried.directory.read_environment()["seeds"]["layer"] == farthest["layer"]
    assert len(told) == 1 and f"layer {farthest['layer']} is the one whose means" in told[0]
    initial_points(context, space, base)
    assert len(told) == 1


def test_a_layer_outside_the_space_is_said(tried: Started) -> None:
    narrow = tried.recipe.search.space.model_copy(update={"direction_layer": (0.0, 0.1)})
    settings = tried.recipe.search.model_copy(update={"space": narrow})
    first, _ = tried.points(tried.recipe.model_copy(update={"search": settings}))
    assert first["direction_layer"] == pytest.approx(0.3)
    assert "reaches from layer 0.0 to 0.3" in tried.progress.notes[-1]


@pytest.mark.parametrize("seeds", ["fisher", "auroc", "silhouette", "mutual-information", "none"])
def test_other_seeds_try_no_layer(seeds: str, tried: Started, planted_folder: Path) -> None:
    settings = tried.recipe.search.model_copy(update={"seeds": seeds})
    recipe = tried.recipe.model_copy(update={"search": settings})
    points = tried.points(recipe)
    assert len(points) == (0 if seeds == "none" else 2)
    before = len(tried.pool.tried)
    try_layers(replace(tried.context, recipe=recipe), tried.sets.scored, tried.setup, None)
    assert len(tried.pool.tried) == before
    if points:
        rows = tried.directory.baseline().separation
        best = tried.directory.read_environment()["seeds"]["layer"]
        measure = seeds.replace("-", "_")
        assert rows[best][measure] == max(row[measure] for row in rows)


def test_a_search_begins_with_these_plans(tried: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune is left out: what it would be given is what is looked at."""
    given: list[Any] = []
    monkeypatch.setattr(TuneSearch, "run", lambda self, pool, setup, seeds, *_: given.append(seeds))
    record = EventRecorder(tried.directory, tried.progress)
    with record.writer:
        search(
            replace(tried.context, record=record),
            tried.pool.put(tried.setup),
            tried.directory.baseline(),
        )
    assert given == [tried.points()]


def test_report_show_and_directions_have_the_table(tried: Started, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ray_abliterate.cli.app import app

    found, path = tried.directory.selection(), str(tried.directory.path)
    page = build_report(tried.directory)
    part = page[page.index('id="layers"') :]
    assert "adding it does not cause refusals" in part and "chosen" in part
    shown = CliRunner().invoke(app, ["show", path])
    assert shown.exit_code == 0, shown.output
    assert "Directions by layer, on held-out prompts" in shown.output
    done = CliRunner().invoke(
        app, ["directions", path, "--method", "mean-difference", "--pairs", "2",
              "--to", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Directions by layer" in done.output
    text = (tmp_path / "out" / "directions.json").read_text()
    assert '"selection"' in text and f'"chosen": {found.chosen.layer}' in text
    html = (tmp_path / "out" / "directions.html").read_text()
    assert "What each layer&#39;s direction does" in html or "What each layer's direction" in html


def test_directions_of_a_recipe_try_layers_where_they_have_not_been_tried(
    tried: Started, planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residuals that are there already are not enough, then."""
    folder = tried.directory.path
    assert extract(tried.recipe, "", tried.base, folder, SilentProgress()).path == folder
    other = Started(tmp_path, planted_folder)
    monkeypatch.setattr(
        "ray_abliterate.pipeline.extraction.load_prompts",
        lambda *_: (_ for _ in ()).throw(SearchError("goes on")),
    )
    with pytest.raises(SearchError, match="goes on"):
        extract(other.recipe, "", other.base, other.directory.path, SilentProgress())


def test_no_more_prompts_are_tried_than_the_papers(tried: Started) -> None:
    sets = {name: type(s)(name, s.prompts * 40) for name, s in tried.sets.scored.items()}
    prompts = effect_prompts(tried.recipe, sets)
    assert len(prompts.behaviour) == len(prompts.neutral) == MOST_PROMPTS == 32
    assert prompts.openings == ("Sorry",)


def test_one_direction_for_all_layers_is_preferred_where_the_space_has_it(tried: Started) -> None:
    settings = tried.recipe.search.space.model_copy(update={"scope": ("per-layer", "global")})
    space = SearchSpace.of(ModelShape(4, 32, ("attn",)), settings, "none")
    uniform, middle = space.initial_points(2.0)
    assert (uniform["direction_scope"], middle["direction_scope"]) == ("global", "per-layer")
