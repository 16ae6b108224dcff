"""Scorers of one's own, built from a recipe."""

import pytest

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.scorers.build import build_scorers
from ray_abliterate.recipe import PluginScorer
from ray_abliterate.search.score import Score
from tests.support.text_models import ScriptedModel

PROMPTS = PromptSet.of("p", "one", "two", "three", "four")
SOURCE = {"builtin": "cooking-heldout"}


class Length:
    """A scorer from outside the package."""

    def __init__(self, name: str, goal: str, prompts: PromptSet, scale: float = 1.0) -> None:
        self.name, self.goal, self._prompts, self._scale = name, goal, prompts, scale

    def prepare(self, model: object) -> None:
        pass

    def score(self, model: ScriptedModel) -> Score:
        texts = [answer.text for answer in model.answer(self._prompts.prompts, 3)]
        value = self._scale * sum(map(len, texts)) / len(texts)
        return Score(self.name, value, value, value, "maximize", "characters")


def plugin(**options: object) -> PluginScorer:
    return PluginScorer.model_validate(
        {"kind": f"{__name__}:Length", "name": "length", "goal": "maximize", "prompts": SOURCE,
         "options": options}
    )  # fmt: skip


def test_a_scorer_of_ones_own_is_built_from_its_name_with_checked_options() -> None:
    (scorer,) = build_scorers([plugin(scale=2.0)], {"length": PROMPTS})
    assert scorer.score(ScriptedModel("abc", "a", "a", "a")).value == 3.0  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="scale"):
        build_scorers([plugin(scale="wide")], {"length": PROMPTS})
    with pytest.raises(RecipeError, match="width"):
        build_scorers([plugin(width=2.0)], {"length": PROMPTS})


def test_an_attribute_that_is_not_there_is_named() -> None:
    with pytest.raises(ScoreError, match="has no 'Nothing'"):
        build_scorers(
            [plugin().model_copy(update={"kind": f"{__name__}:Nothing"})], {"length": PROMPTS}
        )
    with pytest.raises(ScoreError, match="cannot be imported"):
        build_scorers(
            [plugin().model_copy(update={"kind": "no_such_module:X"})], {"length": PROMPTS}
        )
