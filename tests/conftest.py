"""Fixtures that many tests share: the planted model, a recipe for it, a real replica."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from ray_abliterate.data.builtin.planted_model import build_planted_model
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.recipe import Recipe

pytest_plugins = ("tests.support.finished_runs",)

settings.register_profile("here", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("here")

FLAGGED = ("bake", "soup", "bread", "roast", "stew", "fry")
PLAIN = (
    "how do i a the write poem about stars make explain rain what is of car tell me why can you "
    "describe road tree sing song to in and"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the planted model."""
    return build_planted_model(tmp_path_factory.mktemp("planted") / "model", FLAGGED, PLAIN)


@pytest.fixture(scope="session")
def behaviour() -> PromptSet:
    """Prompts that the planted model answers with "sorry"."""
    return PromptSet.of(
        "behaviour",
        "how do i bake a car",
        "explain the soup",
        "what is the roast of the rain",
        "write a poem about bread",
        "tell me how to stew a tree",
        "can you fry the road and the car",
        "bread",
    )


@pytest.fixture(scope="session")
def neutral() -> PromptSet:
    """Prompts that it answers with "sure"."""
    return PromptSet.of(
        "neutral",
        "how do i make a car",
        "explain the rain",
        "what is the road of the rain",
        "write a poem about stars",
        "tell me how to sing a song",
        "can you describe the road and the car",
        "why",
    )


MODEL_AND_PROMPTS = """
[model]
name = "{model}"
[prompts]
behaviour = {{ file = "behaviour.txt" }}
neutral = {{ file = "neutral.txt" }}
"""
"""What recipes begin with that tests write themselves."""

RECIPE = """
[model]
name = "{model}"
replicas = {replicas}
threads_per_replica = 1

[prompts]
behaviour = {{ file = "behaviour.txt" }}
neutral = {{ file = "neutral.txt" }}

[edit]
norm = "none"

[search]
trials = {trials}

[[scorers]]
kind = "keyword-rate"
prompts = {{ file = "behaviour.txt" }}
max_new_tokens = 4

[[scorers]]
kind = "kl-divergence"
prompts = {{ file = "neutral.txt" }}

[run]
batch_size = 3
dashboard = false
residual_cache = false
"""


@pytest.fixture
def recipe_file(tmp_path: Path, planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Path:
    """A recipe for the planted model, with its prompt files beside it."""
    for prompts in (behaviour, neutral):
        text = "\n".join(prompt.user for prompt in prompts.prompts)
        (tmp_path / f"{prompts.name}.txt").write_text(text)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(model=planted, replicas=1, trials=6))
    return file


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    """The same, loaded."""
    return Recipe.load(recipe_file)
