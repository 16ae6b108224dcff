"""The contract, held by every suite that ships."""

from pathlib import Path

import pytest

from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.recipe import Recipe
from ray_abliterate.testing.suites import SuiteContract

HEAD = """
[model]
name = "planted"
[prompts.behaviour]
builtin = "cooking-train"
[prompts.neutral]
builtin = "other-train"
[[scorers]]
kind = "kl-divergence"
prompts = { builtin = "other-heldout" }
[[suites]]
"""


def suite_of(text: str, base: Path = Path()) -> Suite:
    """The suite that a recipe's section describes."""
    (suite,) = build_suites(Recipe.parse(HEAD + text, "recipe.toml").suites, base)
    return suite


class TestMultipleChoice(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "multiple-choice"\ntable = { builtin = "general-knowledge" }\nchunk = 4\n'
        )


class TestMultipleChoiceByText(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "multiple-choice"\ntable = { builtin = "general-knowledge" }\nchunk = 3\n'
            'scoring = "text"\n'
        )


class TestMultipleChoiceWithExamples(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "multiple-choice"\ntable = { builtin = "general-knowledge" }\nchunk = 3\n'
            "shots = 2\n"
        )


class TestOverRefusal(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of('kind = "over-refusal"\nmax_new_tokens = 4\nchunk = 5\n')


class TestKl(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "kl"\nprompts = { builtin = "other-heldout" }\n'
            "tokens = 3\nchunk = 3\nlimit = 8\n"
        )


class TestResponses(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "responses"\nprompts = { builtin = "other-heldout" }\n'
            "max_new_tokens = 5\nchunk = 3\nlimit = 8\n"
        )


class TestSampledResponses(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "responses"\nprompts = { builtin = "other-heldout" }\n'
            "max_new_tokens = 5\nchunk = 3\nlimit = 8\ntemperature = 2.0\n"
        )


class TestOwn(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return suite_of(
            'kind = "tests.support.own_suites:AnswerLength"\nname = "answer-length"\n'
            'prompts = { builtin = "other-heldout", split = "[:6]" }\noptions = { tokens = 3 }\n'
        )
