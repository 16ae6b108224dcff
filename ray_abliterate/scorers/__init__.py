"""The scorers that ship, and how a recipe's scorer settings become scorers."""

from collections.abc import Mapping, Sequence

from ray_abliterate.errors import RecipeError
from ray_abliterate.judges import build as build_judge
from ray_abliterate.prompts import PromptSet
from ray_abliterate.recipe import (
    KeywordRate,
    KlDivergence,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.scorers.kl_divergence import KlDivergenceScorer
from ray_abliterate.scorers.refusal_judge import RefusalJudgeScorer
from ray_abliterate.scorers.refusal_log_odds import RefusalLogOddsScorer
from ray_abliterate.scoring import Scorer, checked_call, resolve


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
    if isinstance(setting, RefusalLogOdds):
        return RefusalLogOddsScorer(setting, prompts[setting.name])
    if isinstance(setting, RefusalJudge):
        return RefusalJudgeScorer(setting, prompts[setting.name], build_judge(setting))
    own = {"prompts": prompts[setting.name]} if setting.name in prompts else {}
    options = {"name": setting.name, "goal": setting.goal, **own, **setting.options}
    owner = f"scorer {setting.name!r} ({setting.kind})"
    scorer = checked_call(owner, resolve(setting.kind), options)
    if not isinstance(scorer, Scorer):
        raise RecipeError(
            f"scorer {setting.name!r}: {setting.kind} made a {type(scorer).__name__}, which lacks "
            "one of name, goal, prepare, score; see docs/extending.md"
        )
    return scorer
