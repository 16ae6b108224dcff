"""A model for suites, questions for it, and suites on a replica whose model is edited."""

import json
from pathlib import Path

import pytest

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.residuals.residual_set import join
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from ray_abliterate.testing.tiny_language_model import tiny_language_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny_language_model(tmp_path_factory.mktemp("suites") / "model", ("stars", "river"))


def questions(*subjects: str, each: int = 4) -> list[dict]:
    """Questions of some subjects, one subject after the other."""
    return [
        {
            "question": f"what is {subject} {number}",
            "subject": subject,
            "choices": ["bread", "soup", "stars", "the river"],
            "answer": number % 4,
        }
        for subject in subjects
        for number in range(each)
    ]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, neutral: PromptSet, behaviour: PromptSet
) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    for prompts in (neutral, behaviour):
        text = "\n".join(prompt.user for prompt in prompts.prompts)
        (folder / f"{prompts.name}.txt").write_text(text)
    return folder


@pytest.fixture
def replica(recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Replica:
    return Replica(recipe, str(planted), {"keyword-rate": behaviour, "kl-divergence": neutral})


@pytest.fixture
def setup(replica: Replica, recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> TrialSetup:
    shards = [
        ResidualShard(replica.extract_residuals(s.name, 0, s.prompts, ()))
        for s in (behaviour, neutral)
    ]
    return TrialSetup(
        directions_from_residuals(*(join([shard]) for shard in shards), recipe.direction)
    )


def ablating(replica: Replica) -> Plan:
    return Plan.uniform(replica.describe().shape, 2.3, "none", 1.0)


def run_suite(replica: Replica, suite: object, plan: Plan, setup: TrialSetup) -> list[SuiteChunk]:
    return [replica.measure(suite, chunk, plan, setup) for chunk in suite.chunks()]
