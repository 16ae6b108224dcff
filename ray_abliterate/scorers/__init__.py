"""The scorers that ship, and how a recipe's scorer settings become scorers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError, validate_call

from ray_abliterate.errors import RecipeError
from ray_abliterate.prompts import PromptSet
from ray_abliterate.recipe import KeywordRate, KlDivergence, ScorerSettings
from ray_abliterate.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.scorers.kl_divergence import KlDivergenceScorer
from ray_abliterate.scoring import Scorer, resolve


def build(
    settings: Sequence[ScorerSettings], prompts: Mapping[str, PromptSet], record: bool = False
) -> tuple[Scorer, ...]:
    """The scorers of a recipe, in its order.

    Args:
        settings: As the recipe has them.
        prompts: Prompt sets by the scorer's name.
        record: Answers are kept, so none is cut short.

    Raises:
        RecipeError: a scorer refuses its options.
    """
    return tuple(_build(setting, prompts, record) for setting in settings)


def _build(setting: ScorerSettings, prompts: Mapping[str, PromptSet], record: bool) -> Scorer:
    if isinstance(setting, KeywordRate):
        return KeywordRateScorer(setting, prompts[setting.name], record)
    if isinstance(setting, KlDivergence):
        return KlDivergenceScorer(setting, prompts[setting.name])
    own = {"prompts": prompts[setting.name]} if setting.name in prompts else {}
    options = {"name": setting.name, "goal": setting.goal, **own, **setting.options}
    try:
        scorer = _checked_call(resolve(setting.kind), options)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"scorer {setting.name!r} ({setting.kind}): {problems}") from None
    if not isinstance(scorer, Scorer):
        raise RecipeError(
            f"scorer {setting.name!r}: {setting.kind} made a {type(scorer).__name__}, which lacks "
            "one of name, goal, prepare, score; see docs/extending.md"
        )
    return scorer


def _checked_call(make: Any, options: Mapping[str, Any]) -> Any:
    """Call a function or class with its options held against its annotations."""
    checked = validate_call(config={"arbitrary_types_allowed": True})
    if not inspect.isclass(make):
        return checked(make)(**options)
    instance = object.__new__(make)
    checked(vars(make)["__init__"])(instance, **options)
    return instance
