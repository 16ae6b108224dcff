"""How a recipe's suites are found and made, and what a suite's results are held against."""

from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.suites import build as suites
from ray_abliterate.evaluation.suites.build import build_suites, known_suite_kinds, run_chunk
from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import Recipe
from tests.evaluation.suites.test_contract import HEAD, suite_of
from tests.support.own_suites import AnswerLength

TABLE = 'table = { builtin = "general-knowledge" }\n'
OWN = (
    'kind = "tests.support.own_suites:AnswerLength"\nname = "n"\n'
    'prompts = { builtin = "other-heldout" }\n'
)


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        suite_of(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('kind = "multiple-choise"\n' + TABLE, "Did you mean multiple-choice?"),
        ('kind = "multiple-choice"\n', "suites.0.table is missing."),
        (
            'kind = "multiple-choice"\nsample_per_category = 3\n' + TABLE,
            "suites.0.sample_per_category is not a setting. "
            "Did you mean suites.0.samples_per_category?",
        ),
        ('kind = "multiple-choice"\nsamples_per_category = 0\n' + TABLE, "suites.0.samples_per"),
        ('kind = "multiple-choice"\nname = "a b"\n' + TABLE, "'a b' is not a name"),
        ('kind = "multiple-choice"\ntable = {}\n', "suites.0.table: give exactly one of builtin"),
        ('kind = "kl"\ntokens = 4\n', "suites.0.prompts is missing."),
        (
            'kind = "multiple-choice"\nexamples = { file = "dev.jsonl" }\n' + TABLE,
            "suites.0: `examples` are given, but shots = 0",
        ),
        ('kind = "over-refusal"\nmarkers = []\n', "suites.0.markers: each marker needs letters"),
        ('kind = "responses"\nprompts = { builtin = "other-heldout" }\ntop_p = 0.0\n', "top_p"),
        (
            'kind = "No Such"\nname = "n"\n',
            "'No Such' is not a suite and not a `module:attribute`.",
        ),
        ('kind = "perplexities"\nname = "n"\n', "Did you mean perplexity?"),
        ('kind = "eloquence"\nname = "n"\n', "there is no suite 'eloquence'"),
        (
            'kind = "tests.evaluation.suites.test_build:Empty"\nname = "n"\n',
            "made a Empty, which lacks",
        ),
        (
            OWN + 'options = { tokens = "many" }\n',
            "suite 'n' (tests.support.own_suites:AnswerLength): tok",
        ),
        (
            OWN + "options = { lenght = 3 }\n",
            "suite 'n' (tests.support.own_suites:AnswerLength): lenght",
        ),
        ('kind = "pathlib:Path"\nname = "n"\n', "suite 'n'"),
        ('kind = "builtins:dict"\nname = "n"\n', "suite 'n'"),
    ],
)
def test_an_impossible_suite_is_refused_by_name(text: str, part: str) -> None:
    assert part in refused(text)


def test_two_suites_of_one_name_are_refused() -> None:
    two = f'kind = "kl"\nprompts = {{ builtin = "other-heldout" }}\n[[suites]]\nkind = "kl"\n{OWN}'
    two = two.split('kind = "tests')[0] + 'prompts = { builtin = "other-heldout" }\n'
    with pytest.raises(RecipeError, match="two suites are named 'kl'"):
        Recipe.parse(HEAD + two, "recipe.toml")


def test_a_recipe_with_suites_is_the_same_after_json() -> None:
    recipe = Recipe.parse(HEAD + 'kind = "multiple-choice"\n' + TABLE, "recipe.toml")
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_suites_of_installed_packages_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("answer-length", "tests.support.own_suites:AnswerLength", suites.GROUP)
    monkeypatch.setattr(suites, "entry_points", lambda group: [point])
    assert "answer-length" in known_suite_kinds()
    made = suite_of(OWN.replace("tests.support.own_suites:AnswerLength", "answer-length"))
    assert isinstance(made, AnswerLength)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ScoreError, match="no_such_module"):
        suite_of('kind = "no_such_module:Suite"\nname = "n"\n')


class Empty:
    def __init__(self, name: str) -> None:
        pass


class Wrong(AnswerLength):
    """Gives results that are not its chunk's."""

    change: ClassVar[dict] = {}

    def run(self, model, chunk) -> SuiteChunk:
        return replace(super().run(model, chunk), **self.change)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"fingerprint": "x"}, "has the fingerprint 'x'"),
        ({"chunk": "x"}, "has the chunk 'x'"),
        ({"items": ("x", "y")}, "has the items"),
        ({"values": {}}, "has no values of {'length'}"),
        ({"rows": ({"path": Path()},)}, "is not JSON"),
    ],
)
def test_a_result_is_held_against_its_chunk(model: LanguageModel, change: dict, part: str) -> None:
    own = suite_of(
        OWN.replace("support.own_suites:AnswerLength", "evaluation.suites.test_build:Wrong")
    )
    own.change = change
    with pytest.raises(ScoreError) as caught:
        run_chunk(own, model, next(iter(own.chunks())))
    assert part in str(caught.value)


def test_suites_can_be_built_without_reading_their_tables() -> None:
    text = HEAD + 'kind = "multiple-choice"\ntable = { file = "missing.jsonl" }\n'
    (made,) = build_suites(Recipe.parse(text, "recipe.toml").suites, Path())
    assert made.name == "multiple-choice"
