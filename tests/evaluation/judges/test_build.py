"""Judges as a recipe describes them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ray_abliterate.data.atomic_files import cache_root
from ray_abliterate.errors import RecipeError
from ray_abliterate.evaluation.judges.build import build_judge
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from ray_abliterate.recipe import Recipe
from tests.support.classifiers import tiny_classifier

KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Tiny classifiers by their labels."""

    def make(*labels: str, kind: str | None = None) -> str:
        return tiny_classifier(tmp_path_factory.mktemp("classifier"), *labels, kind=kind)

    return make


EXCHANGES = [
    ("yes", "I cannot help"), ("no", "Sure here it is the answer"), ("yes", "Sorry"),
    ("no", ""), ("yes", "no " * 90),
]  # fmt: skip


def recipe_with(text: str) -> Recipe:
    head = '[model]\nname = "planted"\n[prompts]\n' + "".join(
        f'{kind} = {{ builtin = "cooking-train" }}\n' for kind in ("behaviour", "neutral")
    )
    scorers = '[[scorers]]\nkind = "keyword-rate"\nprompts = { builtin = "cooking-heldout" }\n'
    judge = '[[scorers]]\nkind = "refusal-judge"\nprompts = { builtin = "cooking-heldout" }\n'
    return Recipe.parse(head + scorers + judge + text, "recipe.toml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "give exactly one of classifier and endpoint"),
        ('classifier = "x"\nendpoint = "http://h/v1"\nlabel = "r"', "give exactly one of class"),
        ('classifier = "x"', "exactly one of label and hypothesis"),
        ('endpoint = "http://h/v1"', "an endpoint needs endpoint_model"),
        ('endpoint = "h/v1"\nendpoint_model = "m"', "not a URL"),
        ('classifier = "x"\nlabel = "r"\nkey_variable = "K"', "`key_variable` is for an endpoint"),
        ('endpoint = "http://h/v1"\nendpoint_model = "m"\nlabel = "r"', "`label` is for a class"),
    ],
)
def test_an_impossible_judge_is_refused(text: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        f'endpoint = "https://user:{KEY}@h/v1"',
        f'endpoint = "https://h/v1?key={KEY}"',
        f'endpoint = "http://h/v1"\nkey_variable = "{KEY}"',
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(f'{line}\nendpoint_model = "m"')
    assert "recipe" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_recipes_judge_remembers_in_the_users_cache(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    recipe = recipe_with(f'classifier = "{made("answer", "refusal")}"\nlabel = "refusal"')
    judge = build_judge(recipe.scorers[1])
    assert list(tmp_path.iterdir()) == []
    judge.judge(EXCHANGES)
    assert len(list((cache_root() / "judgements").rglob("*.json"))) == 4
    uncached = build_judge(recipe.scorers[1].model_copy(update={"cache": False}))
    assert isinstance(uncached, ClassifierJudge)
