"""From prompts to directions: all methods, and hard inputs that are refused or harmless."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.data.prompts import Prompt
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import ModelError, PromptSourceError
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.recipe import METHOD_NAMES, ModelSettings, Recipe
from ray_abliterate.replica.replica import Replica
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import FLAGGED, RECIPE, THINGS, InProcessPool, finish
from tests.support.run_contexts import run_context

SCORERS = (
    {"kind": "keyword-rate", "prompts": {"file": "b.txt"}},
    {"kind": "kl-divergence", "prompts": {"file": "n.txt"}},
)
ENSEMBLE = """
method = "ensemble"
[[direction.ensemble]]
method = "geometric-median"
weight = 0.7
[[direction.ensemble]]
method = "logistic-probe"
weight = 0.3
options = { l2 = 0.1 }
"""
OWN = """
method = "tests.support.own_methods:trimmed_difference"
options = { share = 0.05 }
"""
SUBSPACE = """
method = "svd-subspace"
options = { rank = 3 }
biproject = true
"""
DISCRIMINANTS = ("variance-scaled", "whitened", "leace")
"""Residuals of the planted model vary along the planted direction and hardly elsewhere, so these
turn away from it; see `tests/directions/methods`."""
SECTIONS = {
    "ensemble": ENSEMBLE,
    "own": OWN,
    "subspace": SUBSPACE,
    **{
        name: f'method = "{name}"\n'
        for name in METHOD_NAMES
        if name not in ("mean-difference", "svd-subspace", *DISCRIMINANTS)
    },
}


PROMPTS = tuple(Prompt(text) for text in ("cake", "tell me about the old river", "the stone"))


def changed(folder: Path, to: Path, **tensors: float) -> Path:
    """Return a copy of the model, with whole tensors multiplied by a factor."""
    shutil.copytree(folder, to)
    (file,) = to.glob("*.safetensors")
    weights = load_file(file)
    for name, factor in tensors.items():
        weights[name.replace("__", ".")] *= factor
    save_file(weights, file, metadata={"format": "pt"})
    return to


def found(
    folder: Path,
    model: Path,
    behaviour: Sequence[str] = FLAGGED,
    neutral: Sequence[str] = THINGS,
    more: str = "",
) -> tuple[Any, RunDirectory]:
    """Prompts are loaded, residuals read, directions found; with whole files as sets."""
    folder.mkdir(parents=True)
    compared = (*THINGS[4:], FLAGGED[-1])
    sets = {"behaviour": behaviour, "neutral": neutral, "compared": compared, "scored": FLAGGED}
    for name, words in sets.items():
        lines = "".join(f"tell me about the old {word}\n" for word in words)
        (folder / f"{name}.txt").write_text(lines)
    text = RECIPE.format(model=model, dtype="auto", norm="none", held="") + more
    text = text.replace(', split = "[:4]"', "")
    text = text.replace('"behaviour.txt", split = "[4:]"', '"scored.txt", split = "[4:]"')
    recipe = Recipe.parse(text, "recipe.toml")
    directory, progress = RunDirectory.create(folder / "run", recipe, text), SilentProgress()
    sets = load_prompts(recipe, directory, folder, progress)
    pool: Any = InProcessPool(Replica(recipe, str(model), sets.scored))
    context = run_context(directory, pool, recipe, progress, folder)
    record_environment(context)
    setup, shards = find_directions(context, sets)
    assert shards is not None
    return (setup.directions, shards.separation(setup.directions, recipe.direction)), directory


def test_a_layer_that_gives_what_is_no_number_ends_the_run_by_its_name(
    planted_folder: Path, tmp_path: Path
) -> None:
    factor = float("nan")
    broken = changed(
        planted_folder, tmp_path / "m", model__layers__2__mlp__down_proj__weight=factor
    )
    with pytest.raises(ModelError, match=r"prompt 0 after layer 2 is not finite"):
        finish(tmp_path / "run", broken)


@pytest.mark.parametrize(("dtype", "fits"), [("float16", False), ("bfloat16", True)])
def test_what_overflows_in_float16_is_named_there_and_fits_into_bfloat16(
    dtype: str, fits: bool, planted_folder: Path, tmp_path: Path
) -> None:
    large = changed(planted_folder, tmp_path / "m", model__embed_tokens__weight=1e6)
    values = {"name": str(large), "dtype": dtype}
    sets = {"behaviour": {"file": "b.txt"}, "neutral": {"file": "n.txt"}}
    recipe = Recipe.model_validate({"model": values, "prompts": sets, "scorers": SCORERS})
    replica = Replica(recipe, str(large), {})
    if fits:
        shard = ResidualShard(replica.extract_residuals("behaviour", 0, PROMPTS, ()))
        assert abs(shard.values()).max() > torch.finfo(torch.float16).max
        return
    with pytest.raises(ModelError, match=r"after layer 0 is not finite.*bfloat16 or float32"):
        replica.extract_residuals("behaviour", 0, PROMPTS, ())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("engine", [True, False])
def test_the_tokenizers_padding_side_changes_nothing(
    side: str, engine: bool, planted_folder: Path
) -> None:
    model = LanguageModel.load(str(planted_folder), ModelSettings(name="m"))
    model.chat.tokenizer.padding_side = side
    if not engine:
        model._engine = None
    assert len({len(row) for row in model.encode(PROMPTS)}) == 3
    together, logits = model.residuals(PROMPTS), model.next_token_logits(PROMPTS)
    for index, row in enumerate(model.encode(PROMPTS)):
        with torch.no_grad():
            output = model.module(torch.tensor([row]), output_hidden_states=True)
        for layer, states in enumerate(output.hidden_states[1:-1]):
            torch.testing.assert_close(together[index, layer], states[0, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[index], output.logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", [True, False])
def test_prompts_of_one_token_are_prompts(
    engine: bool, planted_folder: Path, tmp_path: Path
) -> None:
    settings = ModelSettings(name="m", chat_template="plain")
    model = LanguageModel.load(str(planted_folder), settings)
    if not engine:
        model._engine = None
    words = tuple(Prompt(word) for word in ("cake", "river", "tell me about the old stone"))
    rows = model.encode(words)
    assert [len(row) for row in rows[:2]] == [1, 1]
    together = model.residuals(words)
    for index in range(3):
        alone = model.residuals(words[index : index + 1])[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(model.next_token_logits(words)).all()
    assert len(model.answer(words, 2)) == 3
    with pytest.raises(ModelError, match="positions = 2, but prompts end with 0 tokens"):
        model.residuals(words, 2)


def test_the_same_prompts_in_both_sets_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(PromptSourceError, match=r"the same 8 prompts, so there is no direction"):
        found(tmp_path / "run", tmp_path / "no-model", FLAGGED, FLAGGED[::-1])


def test_sets_that_the_model_reads_alike_are_one_clear_error(
    planted_folder: Path, tmp_path: Path
) -> None:
    """Other prompts, the same residuals: a model that reads nothing but its last token."""
    model = tiny_model("llama", layers=2)
    for name, weight in model.named_parameters():
        if name.endswith("o_proj.weight"):
            weight.data.zero_()
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    for file in [*planted_folder.glob("token*"), *planted_folder.glob("chat_template*")]:
        shutil.copy(file, folder)
    with pytest.raises(PromptSourceError, match="leave the same residuals"):
        found(tmp_path / "run", folder)


def test_prompts_that_are_in_both_sets_are_said(
    planted_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, directory = found(tmp_path / "run", planted_folder, FLAGGED, (*THINGS, *FLAGGED[:2]))
    (sentence,) = [w for w in directory.read_environment()["warnings"] if "in both" in w]
    assert sentence.startswith("2 prompts are in both") and sentence in caplog.text


def test_pairs_are_kept_as_they_are_and_a_set_without_partners_is_refused(
    planted_folder: Path, tmp_path: Path
) -> None:
    method = '[direction]\nmethod = "pca-paired"\n'
    twice = (*THINGS[:7], THINGS[0])
    _, directory = found(tmp_path / "run", planted_folder, FLAGGED, twice, method)
    assert len(directory.residuals("neutral").values) == 8
    _, plain = found(tmp_path / "plain", planted_folder, FLAGGED, twice)
    assert len(plain.residuals("neutral").values) == 7
    with pytest.raises(PromptSourceError, match=r"behaviour has 8, and prompts.neutral 7"):
        found(tmp_path / "fewer", tmp_path / "no-model", FLAGGED, THINGS[:7], method)


@pytest.mark.parametrize("counts", [(1, 1), (1, 8), (2, 3)])
def test_fewer_prompts_than_units_still_have_a_direction_and_a_layer(
    counts: tuple[int, int], planted_folder: Path, tmp_path: Path
) -> None:
    one, other = FLAGGED[: counts[0]], THINGS[: counts[1]]
    (directions, rows), _ = found(tmp_path / "run", planted_folder, one, other)
    assert float(directions.vectors[PLANTED_LAYER] @ planted_axes()[0]) > 0.99
    assert all(0 <= row["auroc"] <= 1 for row in rows)


def test_positions_inside_the_prompts_end_the_run_with_how_many_there_are(
    planted_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"(?s)direction.positions = 3.*Set it to 1 or less"):
        finish(tmp_path, planted_folder, more="[direction]\npositions = 3\n")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_method_of_the_recipe_finds_the_planted_direction_and_its_trial_is_scored(
    name: str, planted_folder: Path, tmp_path: Path
) -> None:
    found = finish(tmp_path, planted_folder, norm="none", more=f"[direction]\n{SECTIONS[name]}")
    kept = found.directory.directions()
    assert kept is not None
    assert kept.method == found.directory.read_recipe().direction.method
    assert kept.rank == {"subspace": 3, "inlp": 3}.get(name, 1)
    assert (kept.spared is not None) == (name == "subspace")
    r = planted_axes()[0]
    inside = (kept.basis[PLANTED_LAYER] @ r).norm()
    assert float(inside) > 0.99
    assert float(kept.vectors[PLANTED_LAYER] @ r) > (0.9 if kept.rank > 1 else 0.99)
    rate, baseline = found.trial.scorecard["keyword-rate"], found.directory.baseline()
    assert baseline is not None and baseline.scorecard["keyword-rate"].value == 1.0
    assert rate.value == 0.0
    assert torch.equal(kept.rows, found.directory.directions().rows)
