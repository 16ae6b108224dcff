"""Recipes: what is accepted, what is refused, and what the refusal says."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import (
    KeywordRate,
    KlDivergence,
    PluginScorer,
    PromptSource,
    Recipe,
    SearchSettings,
    SpaceSettings,
)

RECIPE = """
[model]
name = "planted"

[prompts.behaviour]
file = "shows.txt"

[prompts.neutral]
dataset = "owner/name"
split = "train[:400]"
column = "text"

[search]
trials = 30

[[scorers]]
kind = "keyword-rate"
prompts = { builtin = "cooking-heldout" }

[[scorers]]
kind = "kl-divergence"
prompts = { builtin = "other-heldout" }
"""


def parse(*overrides: str, text: str = RECIPE) -> Recipe:
    return Recipe.parse(text, "recipe.toml", overrides)


def message(*overrides: str, text: str = RECIPE) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(*overrides, text=text)
    return str(caught.value)


def test_a_recipe_needs_a_model_two_prompt_sets_and_a_scorer_and_no_more():
    recipe = parse()
    assert recipe.model.name == "planted"
    assert recipe.prompts.neutral.bounds == (0, 400)
    assert [scorer.name for scorer in recipe.scorers] == ["keyword-rate", "kl-divergence"]
    for missing in ("model.name", "prompts.behaviour", "scorers"):
        lines = [line for line in message(text="x = 1").splitlines() if "missing" in line]
        assert any(missing.startswith(line.split(": ")[1].split()[0]) for line in lines)


# Unknown keys


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("serch.trials=3", "recipe.toml: serch is not a setting. Did you mean search?"),
        ("search.trails=3", "search.trails is not a setting. Did you mean search.trials?"),
        ("search.space.peek=[0,1]", "search.space.peek is not a setting. Did you mean search."),
        (
            "prompts.neutral.colum=text",
            "prompts.neutral.colum is not a setting. Did you mean prompts.neutral.column?",
        ),
        ("scorers.1.token=4", "scorers.1.token is not a setting. Did you mean scorers.1.tokens?"),
        ("scorers.0.prompts.flie=a.txt", "Did you mean scorers.0.prompts.file?"),
        (
            "search.space.components.mlp.peek=[0,1]",
            "search.space.components.mlp.peek is not a setting. "
            "Did you mean search.space.components.mlp.peak?",
        ),
        ("edit.xyzzy=1", "edit.xyzzy is not a setting. Known: norm."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_setting(override, line):
    assert line in message(override)


def test_all_problems_of_a_recipe_are_reported_at_once():
    lines = message("search.trails=3", "run.batch_size=0", "edit.norm=rows").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("recipe.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.quantization=nf5"], "'torchao-int8' or 'torchao-int4' (found 'nf5')"),
        (["model.max_memory.gpu=30GiB"], "'gpu' is not a device; give the number of a GPU"),
        (["model.max_memory.cpu=lots"], "cpu = 'lots' is not a size; write `14GiB` or `600MB`"),
        (
            ["model.max_memory.0=20GiB", "model.gpus_per_replica=0"],
            "max_memory names GPU 0, but gpus_per_replica = 0",
        ),
    ],
)
def test_memory_and_quantization_that_can_not_be_are_refused(overrides, expected):
    assert expected in message(*overrides)


@pytest.mark.parametrize("component", ["atn", "mpl", "router"])
def test_a_range_for_an_unknown_component_is_refused(component):
    text = message(f"search.space.components.{component}.peak=[0,1]")
    assert f"components.{component} is not a component" in text


def test_feed_forward_components_can_be_switched_off_unless_the_recipe_says_otherwise():
    space = parse("search.space.components.attn.peak=[1,2]").search.space
    assert space.components["attn"].peak == (1, 2)
    for name in ("mlp", "experts", "shared_experts"):
        assert space.components[name].peak == (-0.25, 1.5)
    mlp = parse("search.space.components.mlp.reach=[0.1,0.2]").search.space.components["mlp"]
    assert (mlp.peak, mlp.reach) == ((-0.25, 1.5), (0.1, 0.2))
    mlp = parse("search.space.components.mlp.peak=[0.5,1]").search.space.components["mlp"]
    assert mlp.peak == (0.5, 1)


# Overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("search.trials=50", lambda r: r.search.trials, 50),
        ("scorers.1.tokens=4", lambda r: r.scorers[1].tokens, 4),
        ("scorers.0.markers=strict", lambda r: r.scorers[0].markers, "strict"),
        ('scorers.0.markers=["a", "b"]', lambda r: r.scorers[0].markers, ("a", "b")),
        ("model.name=Qwen/Qwen3-0.6B", lambda r: r.model.name, "Qwen/Qwen3-0.6B"),
        ('model.name="demo"', lambda r: r.model.name, "demo"),
        ("edit.norm=column", lambda r: r.edit.norm, "column"),
        ("prompts.behaviour.prefix=a=b", lambda r: r.prompts.behaviour.prefix, "a=b"),
        ("run.save_residuals=false", lambda r: r.run.save_residuals, False),
        ("run.residual_cache=false", lambda r: r.run.residual_cache, False),
        ("direction.residual_dtype=float16", lambda r: r.direction.residual_dtype, "float16"),
        ("model.max_memory.cpu=30GiB", lambda r: r.model.max_memory, {"cpu": "30GiB"}),
    ],
)
def test_an_override_sets_one_value_with_or_without_quotes(override, read, value):
    assert read(parse(override)) == value


def test_the_last_of_two_overrides_counts():
    assert parse("search.trials=5", "search.trials=6").search.trials == 6


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("search.trials", "write key=value"),
        ("=5", "write key=value"),
        ("scorers.9.tokens=4", "'9' must be a number from 0 to 1"),
        ("scorers.kl.tokens=4", "'kl' must be a number"),
        ("model.name.x=1", "model.name is a value, not a section"),
        ("search.trials=many", "search.trials"),
        ("model=demo", "model"),
    ],
)
def test_an_override_that_fits_nothing_is_refused_by_name(override, part):
    assert part in message(override)


@given(st.text(max_size=30))
def test_no_override_raises_anything_but_a_recipe_error(text):
    try:
        parse(text)
        parse(f"search.{text}")
        parse(f"model.name={text}")
    except RecipeError:
        pass


# Values


def test_a_recipe_survives_json():
    recipe = parse(
        "search.space.peak=[0.5, 2]", "scorers.0.markers=['x']", "model.max_memory.0=1GiB"
    )
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()


def test_a_recipe_with_every_kind_of_scorer_survives_json():
    values = json.loads(parse().to_json())
    values["scorers"].append({"kind": "my.module:Scorer", "name": "mine", "options": {"k": [1]}})
    recipe = Recipe.model_validate(values)
    assert [type(scorer) for scorer in recipe.scorers] == [KeywordRate, KlDivergence, PluginScorer]
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        parse().search.trials = 3


@pytest.mark.parametrize("kind", ["module:attribute", "a.b.c:D", "_x:_y"])
def test_a_scorer_of_ones_own_is_named_by_module_and_attribute(kind):
    recipe = parse(f'scorers.1={{ kind = "{kind}", name = "mine", goal = "maximize" }}')
    assert isinstance(recipe.scorers[1], PluginScorer)
    assert recipe.scorers[1].kind == kind


@pytest.mark.parametrize("kind", ["keyword-rat", "module", "a:b:c", "a b:c", ":x", "x:", ""])
def test_another_kind_of_scorer_is_refused(kind):
    text = message(f'scorers.1={{ kind = "{kind}", name = "mine" }}')
    assert "is not a scorer" in text
    if kind == "keyword-rat":
        assert "Did you mean keyword-rate?" in text


def test_a_scorer_without_a_kind_is_refused():
    assert "scorers.1.kind is missing" in message('scorers.1={ name = "mine" }')


def test_scorers_have_names_of_their_own():
    assert "two scorers are named 'keyword-rate'" in message("scorers.1.name=keyword-rate")


def test_a_search_needs_something_to_optimise():
    assert "optimise" in message("scorers.0.goal=report", "scorers.1.goal=report")


@pytest.mark.parametrize(
    "bounds", ["peak=[2,1]", "reach=[0.5,0.4]", "components.attn.peak=[1,0]", "floor=[1,0.5]"]
)
def test_a_range_runs_from_low_to_high(bounds):
    assert "must run from low to high" in message(f"search.space.{bounds}")


@pytest.mark.parametrize("bounds", ["[0.2, 0.1]", "[-1.5, 0.0]", "[0.0, 2.0]"])
def test_an_offset_runs_upwards_inside_the_model(bounds):
    assert "source_offset = [" in message(f"search.space.source_offset={bounds}")


def test_an_offset_without_the_scope_that_uses_it_is_refused():
    with pytest.raises(ValidationError, match="source_offset is for `per-layer`"):
        SpaceSettings(scope=("global",), source_offset=(-0.1, 0.1))


@pytest.mark.parametrize("bounds", ["peak_layer=[0,1.5]", "direction_layer=[0,2]", "floor=[0,1.1]"])
def test_a_fraction_ends_at_one(bounds):
    assert "ends at 1" in message(f"search.space.{bounds}")


@pytest.mark.parametrize("bounds", ["reach=[-1,0]", "peak_layer=[-0.1,1]", "floor=[-0.5,1]"])
def test_only_a_peak_may_be_negative(bounds):
    assert "must not be negative" in message(f"search.space.{bounds}")
    assert parse("search.space.peak=[-1,1]").search.space.peak == (-1, 1)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_setting_is_infinite_or_not_a_number(value):
    assert "search.space.peak" in message(f"search.space.peak=[{value},1]")


def test_a_search_space_needs_a_scope():
    assert "scope" in message("search.space.scope=[]")


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "true", "many"])
def test_trials_share_passes_by_number_or_as_the_run_chooses(value):
    assert parse().search.trials_per_pass == "auto"
    assert parse("search.trials_per_pass=auto") == parse()
    assert parse("search.trials_per_pass=3").search.trials_per_pass == 3
    text = message(f"search.trials_per_pass={value}")
    assert "search.trials_per_pass: give a whole number of 1 or more, or `auto` (found" in text


def test_batches_of_plans_share_no_passes():
    batches = "search.batch_synchronous=true", "search.concurrency=4"
    assert parse(*batches).search.trials_per_pass == "auto"
    assert parse(*batches, "search.trials_per_pass=1").search.batch_synchronous
    text = message(*batches, "search.trials_per_pass=2")
    assert "batch_synchronous needs trials_per_pass = 1" in text


@pytest.mark.parametrize(("gpus", "accepted"), [(0, 1), (0.25, 1), (1, 1), (2, 1), (1.5, 0)])
def test_gpus_of_a_replica_are_a_fraction_or_whole(gpus, accepted):
    if accepted:
        assert parse(f"model.gpus_per_replica={gpus}").model.gpus_per_replica == gpus
    else:
        assert "whole number" in message(f"model.gpus_per_replica={gpus}")


@pytest.mark.parametrize(
    ("trials", "startup"), [(1, 0), (10, 3), (30, 9), (200, 60), (199, 59), (1000, 60)]
)
def test_a_search_starts_with_three_tenths_of_its_trials_at_random_and_at_most_60(trials, startup):
    assert SearchSettings(trials=trials).startup == startup
    assert SearchSettings(trials=trials, startup_trials=7).startup == 7


# Prompt sources


@pytest.mark.parametrize(
    ("split", "name", "bounds"),
    [
        ("", "", (0, None)),
        ("test", "test", (0, None)),
        ("train[:400]", "train", (0, 400)),
        ("[10:60]", "", (10, 60)),
        ("train_sft[5:]", "train_sft", (5, None)),
        ("a.b-c[:]", "a.b-c", (0, None)),
    ],
)
def test_a_split_has_a_name_and_bounds(split, name, bounds):
    source = PromptSource(file="p.txt", split=split)
    assert (source.split_name, source.bounds) == (name, bounds)


@pytest.mark.parametrize("split", ["train[:10%]", "train[-5:]", "[1]", "a b", "train[5:5]", "[:0]"])
def test_a_split_that_cannot_be_read_or_selects_nothing_is_refused(split):
    assert "prompts.neutral.split" in message(f"prompts.neutral.split='{split}'")


def test_a_prompt_set_has_exactly_one_source():
    assert "found file and builtin" in message("prompts.behaviour.builtin=x").replace(
        "builtin and file", "file and builtin"
    )
    assert "found none" in message("prompts.behaviour={}")


@pytest.mark.parametrize("source", [{"file": "p.csv"}, {"folder": "p"}, {"dataset": "owner/name"}])
def test_a_table_needs_a_column(source):
    with pytest.raises(ValidationError, match="column"):
        PromptSource(**source)


def test_writers_of_an_unknown_family_need_a_regular_expression():
    row = '{ pattern = "(", component = "mlp" }'
    assert "not a regular expression" in message(f"model.writers=[{row}]")


# Files


def test_a_recipe_that_cannot_be_read_says_how_to_write_one(tmp_path):
    with pytest.raises(RecipeError, match="ray-abliterate init"):
        Recipe.load(tmp_path / "nope.toml")
    (tmp_path / "latin.toml").write_bytes(b"# K\xe4se")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(tmp_path / "latin.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(RecipeError, match=r"bad\.toml is not TOML"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "good.toml").write_text(RECIPE)
    assert Recipe.load(tmp_path / "good.toml", ("search.trials=4",)).search.trials == 4


def test_a_recipe_is_read_without_any_heavy_library():
    heavy = ["torch", "numpy", "transformers", "datasets", "pyarrow", "ray", "optuna", "scipy"]
    code = (
        "import sys; from ray_abliterate.recipe import Recipe\n"
        f"Recipe.parse({RECIPE!r}, 'r')\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Over all spaces


def intervals(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    pair = st.tuples(st.floats(low, high), st.floats(low, high))
    return pair.map(lambda bounds: (min(bounds), max(bounds)))


@given(
    peak=intervals(-3, 3),
    layer=intervals(0, 1),
    reach=intervals(0, 5),
    trials=st.integers(1, 10**6),
)
def test_what_is_accepted_survives_json(peak, layer, reach, trials):
    values: dict[str, Any] = copy.deepcopy(json.loads(parse().to_json()))
    values["search"]["space"] |= {"peak": peak, "peak_layer": layer, "reach": reach}
    values["search"]["trials"] = trials
    recipe = Recipe.model_validate(values)
    assert recipe.search.space == SpaceSettings(peak=peak, peak_layer=layer, reach=reach)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "judge",
    [
        'classifier = "owner/judge"\nlabel = "refusal"',
        'endpoint = "http://h/v1"\nendpoint_model = "m"',
    ],
)
def test_a_resolved_recipe_with_a_judge_is_read_again(judge):
    """It names every setting, those of the other kind of judge at their defaults."""
    text = (
        '[model]\nname = "m"\n[prompts]\nbehaviour = { file = "a.txt" }\n'
        'neutral = { file = "b.txt" }\n[[scorers]]\nkind = "keyword-rate"\n'
        'prompts = { file = "c.txt" }\n[[scorers]]\nkind = "refusal-judge"\n'
        f'prompts = {{ file = "c.txt" }}\n{judge}\n'
    )
    recipe = Recipe.parse(text, "recipe.toml")
    assert Recipe.from_json(recipe.to_json()) == recipe


FILTER = "prompts.filter_by_behaviour=true"
JUDGE = """
[[scorers]]
kind = "refusal-judge"
classifier = "some/classifier"
label = "refusal"
prompts = { builtin = "cooking-heldout" }
"""
ODDS = """
[[scorers]]
kind = "refusal-log-odds"
prompts = { builtin = "cooking-heldout" }
"""
DIVERGENCE = RECIPE[RECIPE.rindex("[[scorers]]") :]


@pytest.mark.parametrize(
    ("scorers", "name"),
    [
        (ODDS + RECIPE[RECIPE.index("[[scorers]]") :] + JUDGE, "keyword-rate"),
        (JUDGE + RECIPE[RECIPE.index("[[scorers]]") :], "refusal-judge"),
        (DIVERGENCE + ODDS, "refusal-log-odds"),
    ],
)
def test_prompts_are_filtered_by_the_first_scorer_that_reads_answers(scorers, name):
    text = RECIPE[: RECIPE.index("[[scorers]]")] + scorers
    assert parse(FILTER, text=text).behaviour_test.name == name


def test_prompts_are_filtered_only_with_a_judge_and_where_no_pairs_are_needed():
    text = RECIPE[: RECIPE.index("[[scorers]]")] + DIVERGENCE
    assert "filter_by_behaviour needs a scorer that judges single answers" in message(
        FILTER, text=text
    )
    parse(text=text)
    assert "the pairs that pca-paired needs" in message(FILTER, 'direction.method="pca-paired"')
    member = 'direction.ensemble=[{method="whitened"},{method="pca-paired"}]'
    assert "the pairs that pca-paired needs" in message(
        FILTER, 'direction.method="ensemble"', member
    )


def test_layers_are_tried_on_prompts_of_scorers_which_have_to_be_there():
    text = RECIPE + ODDS.replace("kind =", 'goal = "report"\nkind =')
    assert parse('search.seeds="log-odds"', text=text).search.seeds == "log-odds"
    assert parse().search.seeds == "fisher"
    error = message('search.seeds="log-odds"')
    assert "prompts of a refusal-log-odds scorer, and there is none" in error
    text = RECIPE[: RECIPE.index("[[scorers]]")] + ODDS
    assert "prompts of a kl-divergence scorer" in message('search.seeds="log-odds"', text=text)
    assert "search.seeds" in message('search.seeds="odds"')
