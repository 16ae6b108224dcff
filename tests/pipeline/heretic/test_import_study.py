"""Runs made of studies of Heretic.

Both journals were written by Heretic itself, 1.4.0 and its master branch (commit 20b7bf7), in runs
of five trials on the tiny planted model; they hold no prompts.
"""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ray_abliterate.cluster.tune_searcher import OutcomeHandlers, TuneSearcher
from ray_abliterate.errors import ForeignStudyError, ModelError, RunExists
from ray_abliterate.model.architecture import Writer
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.heretic.heretic_study import read_study
from ray_abliterate.pipeline.heretic.import_study import import_study, matching_components
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.recipe import Recipe
from ray_abliterate.recipe.toml_writer import to_toml
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.space import SearchSpace
from ray_abliterate.search.study import STUDY_NAME, make_sampler, open_storage, open_study
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import FLAGGED, THINGS, InProcessPool
from tests.support.run_contexts import run_context

DATA = Path(__file__).parents[2] / "support" / "heretic"
BOTH = pytest.mark.parametrize("version", ["1.4", "master"])
SHAPE = ModelShape(4, 32, ("attn", "mlp"))


def journal(version: str) -> Path:
    return DATA / f"heretic-{version}.jsonl"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that Heretic was run in: its prompt files are there."""
    monkeypatch.chdir(tmp_path)
    for name, words in {"behaviour": FLAGGED, "neutral": THINGS}.items():
        lines = "".join(f"tell me about the old {word}\n" for word in words)
        (tmp_path / f"{name}.txt").write_text(lines)
    return tmp_path


def taken_over(version: str, folder: Path, model: Path, **options: Any) -> RunDirectory:
    made = import_study(journal(version), folder, SilentProgress(), str(model), **options)
    return made.directory


def space(directory: RunDirectory) -> SearchSpace:
    recipe = directory.read_recipe()
    return SearchSpace.of(SHAPE, recipe.search.space, recipe.edit.norm)


def waiting(directory: RunDirectory) -> list[Any]:
    study = open_study(open_storage(directory.journal), ["minimize"] * 2)
    return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def changed(tmp_path: Path, old: str, new: str, version: str = "1.4") -> Path:
    """The journal with another text in it."""
    text = journal(version).read_text()
    assert old in text
    (tmp_path / "changed.jsonl").write_text(text.replace(old, new))
    return tmp_path / "changed.jsonl"


# Plans


@BOTH
def test_a_plans_strengths_are_those_that_heretic_computes(place, planted_folder, version):
    """From the parameters that it keeps for its own use, which are in its own terms."""
    directory = taken_over(version, place / "run", planted_folder)
    study = read_study(journal(version))
    theirs = {}
    for line in journal(version).read_text().splitlines():
        entry = json.loads(line)
        if "parameters" in (known := entry.get("user_attr", {})):
            theirs[entry["trial_id"] + 1] = known["parameters"]
    plans = [
        space(directory).plan(trial.system_attrs["fixed_params"]) for trial in waiting(directory)
    ]
    assert len(plans) == len(study.trials) == 5
    for plan, trial in zip(plans, study.trials, strict=True):
        for ours, name in (("attn", "attn.o_proj"), ("mlp", "mlp.down_proj")):
            known = theirs[trial.index][name]
            for layer, strength in enumerate(plan.strengths(ours, 4)):
                distance = abs(layer - known["max_weight_position"])
                share = distance / known["min_weight_distance"]
                weight = known["max_weight"] + share * (known["min_weight"] - known["max_weight"])
                assert strength == pytest.approx(weight if share <= 1 else 0.0, abs=1e-12)
        assert plan.scope == trial.params["direction_scope"].replace(" ", "-")
        assert plan.direction_layer == trial.params["direction_index"]
        assert plan.norm == "row"


@BOTH
def test_the_search_takes_up_the_plans_first_and_then_its_own(place, planted_folder, version):
    """With the searcher that runs under Ray, which needs no cluster to be asked."""
    directory = taken_over(version, place / "run", planted_folder)
    known = [trial.system_attrs["fixed_params"] for trial in waiting(directory)]
    storage = open_storage(directory.journal)
    handlers = OutcomeHandlers(lambda *_: None, lambda _: None, lambda _: ())
    searcher = TuneSearcher(
        space(directory), handlers, 100, lambda: False,
        metric=["keyword-rate", "kl-divergence"], mode=["min", "min"], points_to_evaluate=None,
        sampler=make_sampler(directory.read_recipe().search, len(known)),
        study_name=STUDY_NAME, storage=storage,
    )  # fmt: skip
    asked = [searcher.suggest(f"t{n}") for n in range(7)]
    for number, params in enumerate(known):
        assert {k: v for k, v in asked[number].items() if k != "plan"} == params
        assert Plan.from_json(asked[number]["plan"]) == space(directory).plan(params)
    own = [{k: v for k, v in params.items() if k != "plan"} for params in asked[5:]]
    assert all(params not in known for params in own)


def test_heretics_front_comes_first_and_can_come_alone(place, planted_folder):
    study = read_study(journal("1.4"))
    losses = [trial.losses for trial in study.trials]
    front = losses[: study.front]
    assert 0 < study.front < 5
    for loss in losses[study.front :]:
        assert any(all(a <= b for a, b in zip(m, loss, strict=True)) for m in front)
    alone = taken_over("1.4", place / "alone", planted_folder, front_only=True)
    assert alone.read_recipe().search.trials == len(waiting(alone)) == study.front


@BOTH
def test_the_verdicts_are_heretics(place, planted_folder, version):
    """Evaluated here on the same model, each plan refuses as often as Heretic counted."""
    directory = taken_over(version, place / "run", planted_folder)
    recipe, progress = directory.read_recipe(), SilentProgress()
    sets = load_prompts(recipe, directory, directory.read_base(), progress)
    pool: Any = InProcessPool(Replica(recipe, str(planted_folder), sets.scored))
    context = run_context(directory, pool, recipe, progress)
    record_environment(context)
    setup, _ = find_directions(context, sets)
    found = directory.imported_study()
    assert [trial["number"] for trial in found["trials"]] == list(range(5))
    for trial, known in zip(waiting(directory), found["trials"], strict=True):
        plan = space(directory).plan(trial.system_attrs["fixed_params"])
        score = pool.replica.evaluate(plan, setup).scorecard["keyword-rate"]
        counted = known["scores"].get("refusals") or known["scores"]["Keywords"]
        assert f"{score.detail['hits']}/{score.detail['total']}" == counted


# The recipe


@BOTH
def test_the_recipe_says_what_heretics_settings_say(place, planted_folder, version):
    directory = taken_over(version, place / "run", planted_folder)
    recipe = directory.read_recipe()
    assert Recipe.load(directory.path / "recipe.toml") == recipe
    assert recipe.prompts.behaviour.file == "behaviour.txt"
    assert recipe.prompts.behaviour.bounds == (0, 4) and not recipe.prompts.behaviour.deduplicate
    assert recipe.prompts.neutral.system == "You are a helpful assistant."
    rate, kl = recipe.scorers
    assert rate.markers == ("sorry",) and rate.max_new_tokens == 4
    assert rate.prompts.bounds == (4, None) and kl.prompts.file == "neutral.txt"
    assert recipe.search.trials == 5 and recipe.search.seed == 7
    assert recipe.search.startup_trials == 3 and recipe.search.seeds == "none"
    assert recipe.edit.norm == "row" and recipe.run.batch_size == 4
    ranges = dict(space(directory).parameters)
    assert (ranges["attn.peak"].low, ranges["attn.peak"].high) == (0.8, 1.5)
    assert ranges["mlp.peak"].low == (0.8 if version == "1.4" else -0.25)
    assert ranges["mlp.reach"].low == 1.0 and ranges["mlp.reach"].high == pytest.approx(1.8)
    assert ranges["direction_layer"].high == pytest.approx(2.7)
    given = directory.journal.read_bytes()
    assert given and journal(version).read_bytes() != given


def test_prompt_sets_of_the_hub_are_named_with_what_is_put_around_them(place, planted_folder):
    old = (
        '\\"bad_prompts\\":{\\"dataset\\":\\"behaviour.txt\\",'
        '\\"commit\\":null,\\"split\\":\\"[:4]\\",'
    )
    new = old.replace("behaviour.txt", "owner/set").replace("null", '\\"abc\\"')
    file = changed(place, old, new.replace("[:4]", "train[:40]"))
    text = file.read_text().replace('\\"column\\":null', '\\"column\\":\\"text\\"')
    file.write_text(text.replace('\\"prefix\\":\\"\\"', '\\"prefix\\":\\"Please\\"'))
    made = import_study(file, place / "run", SilentProgress(), str(planted_folder))
    source = made.directory.read_recipe().prompts.behaviour
    assert (source.dataset, source.revision, source.column) == ("owner/set", "abc", "text")
    assert source.split == "train[:40]" and source.prefix == "Please "


def test_toml_holds_what_it_was_made_of():
    values = {
        "a": {"text": 'q"\\\n\x7f é🦀', "list": [1, 2.5, True], "x.y": {"z": []}},
        "b": [{"n": 1}, {"n": 2}],
    }
    assert tomllib.loads(to_toml(values)) == values


# What can't be taken over


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('\\"row_normalization\\":\\"full\\"', '\\"row_normalization\\":\\"pre\\"', "relative to"),
        ('quantile\\":1.0', 'quantile\\":0.3', "between 0.5 and 1"),
        ('\\"dataset\\":\\"behaviour.txt\\"', '\\"dataset\\":\\"gone.txt\\"', "does not exist"),
        ('\\"split\\":\\"[:4]\\"', '\\"split\\":\\"[:10%]\\"', "no counterpart"),
        ("mlp.down_proj.max_weight\"", "mlp.down_proj.start_layer\"", "other parameters"),
        ('"high\\": 3.0', '"high\\": 7.0', "8 layers"),
        ('"settings"', '"other"', "no settings of Heretic's"),
        ('"kl_divergence"', '"kl"', "not as Heretic"),
        ('"state":1', '"state":3', "no finished trial"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(place, planted_folder, old, new, words):
    with pytest.raises(ForeignStudyError, match=words):
        import_study(changed(place, old, new), place / "run", SilentProgress(), str(planted_folder))
    assert not (place / "run").exists()


def test_another_plugin_as_scorer_is_refused(place, planted_folder):
    file = changed(place, "heretic.scorers.keyword_rate.KeywordRate", "mine.Own", "master")
    with pytest.raises(ForeignStudyError, match=r"scorer mine\.Own"):
        import_study(file, place / "run", SilentProgress(), str(planted_folder))


def test_files_that_are_no_journal_and_models_that_are_not_there_are_named(place, planted_folder):
    for data in (b"not a journal\nat all\n", b"", b'{"op_code": 4}\n{"x": 1}\n'):
        (place / "x.jsonl").write_bytes(data)
        with pytest.raises(ForeignStudyError, match=r"x\.jsonl"):
            import_study(place / "x.jsonl", place / "run", SilentProgress())
    with pytest.raises(ForeignStudyError, match="does not exist"):
        import_study(place / "y.jsonl", place / "run", SilentProgress())
    with pytest.raises(ModelError, match="--model"):
        import_study(journal("1.4"), place / "run", SilentProgress(), str(place / "nowhere"))
    taken_over("1.4", place / "run", planted_folder)
    with pytest.raises(RunExists):
        taken_over("1.4", place / "run", planted_folder)


def test_a_torn_journal_is_read_up_to_there_and_left_as_it_is(place, planted_folder):
    data = journal("1.4").read_bytes()
    end = data.index(b'"trial_id":3')
    torn = data[: end + 20]
    (place / "torn.jsonl").write_bytes(torn)
    made = import_study(place / "torn.jsonl", place / "run", SilentProgress(), str(planted_folder))
    assert len(made.trials) == 3 and made.study.unfinished == 1
    assert (place / "torn.jsonl").read_bytes() == torn
    assert not list(place.glob("torn.jsonl.*"))


def writer(component: str, name: str) -> Writer:
    return Writer(0, component, f"model.layers.0.{name}.weight", 0, None, None)


def test_components_are_those_that_edit_the_same_matrices():
    theirs = ("attn.o_proj", "mlp.down_proj")
    known = [
        writer("attn", "self_attn.o_proj"), writer("linear_attn", "linear_attn.out_proj"),
        writer("mlp", "mlp.down_proj"), writer("experts", "mlp.experts.down_proj"),
        writer("shared_experts", "mlp.shared_expert.down_proj"),
    ]  # fmt: skip
    assert matching_components(known, theirs) == {
        "attn": "attn.o_proj", "linear_attn": "attn.o_proj", "mlp": "mlp.down_proj",
        "experts": None, "shared_experts": None,
    }  # fmt: skip
    assert matching_components([writer("experts", "mlp.experts.7.down_proj")], theirs) == {
        "experts": "mlp.down_proj"
    }
    mixed = [writer("mlp", "mlp.down_proj"), writer("mlp", "mlp.other")]
    with pytest.raises(ForeignStudyError, match="as a whole"):
        matching_components(mixed, theirs)
    with pytest.raises(ForeignStudyError, match="as a whole"):
        matching_components([writer("mlp", "mlp.down_proj")], ("attn.o_proj",))


def test_a_study_of_a_mixture_of_experts_leaves_stacked_experts_alone(place):
    """Its journal has no component for them, because Heretic finds no matrix there to edit."""
    tiny_model("mixtral", layers=4).config.save_pretrained(place / "moe")
    lines = journal("1.4").read_text().splitlines(keepends=True)
    (place / "moe.jsonl").write_text("".join(x for x in lines if '"param_name":"mlp' not in x))
    directory = import_study(
        place / "moe.jsonl", place / "run", SilentProgress(), str(place / "moe")
    ).directory
    assert any("does not edit experts" in note for note in directory.imported_study()["notes"])
    settings = directory.read_recipe().search.space
    moe = SearchSpace.of(ModelShape(4, 32, ("attn", "experts")), settings, "row")
    plans = [moe.plan(trial.system_attrs["fixed_params"]) for trial in waiting(directory)]
    assert [plan.strengths("experts", 4) for plan in plans] == [(0.0,) * 4] * 5
    assert all(any(plan.strengths("attn", 4)) for plan in plans)


def test_nothing_private_is_in_the_journals():
    for file in DATA.glob("heretic-*.jsonl"):
        text = file.read_text()
        assert not any(word in text for word in ("/home", "/root", "/Users", "tell me", "cake"))


def test_show_tells_heretics_scores_from_our_own(place, planted_folder):
    from ray_abliterate.cli.tables import foreign_table
    from ray_abliterate.cli.terminal import console

    directory = taken_over("1.4", place / "run", planted_folder)
    output = console()
    with output.capture() as shown:
        output.print(foreign_table(directory.imported_study(), rows=2))
    assert "As scored by Heretic 1.4, not by this run" in shown.get()
    assert "0/4" in shown.get() and "2 of 5 trials" in shown.get()
    shutil.rmtree(directory.path)
