"""Builds the scorers that a recipe describes: those that ship, and plug-ins."""

from collections.abc import Mapping, Sequence

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import RecipeError
from ray_abliterate.evaluation.judges.build import build_judge
from ray_abliterate.evaluation.judges.judge import Judge
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.evaluation.scorers.kl_divergence import KlDivergenceScorer
from ray_abliterate.evaluation.scorers.refusal_judge import RefusalJudgeScorer
from ray_abliterate.evaluation.scorers.refusal_log_odds import RefusalLogOddsScorer
from ray_abliterate.evaluation.scorers.scorer import BehaviourTest, Scorer
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.recipe import (
    KeywordRate,
    KlDivergence,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.recipe.plugins import checked_call, resolve

Judges = Mapping[str, Judge]
"""Judges by the scorer's name, for scorers whose judge runs in another process."""


def build_scorers(
    settings: Sequence[ScorerSettings],
    prompts: Mapping[str, PromptSet],
    record: bool = False,
    judges: Judges | None = None,
) -> tuple[Scorer, ...]:
    """Build the scorers of a recipe, in its order.

    Args:
        settings: The recipe's `[[scorers]]`.
        prompts: Prompt sets by the scorer's name.
        record: Answers are recorded, so none may be cut short.
        judges: Judges that run in another process; the others run in this one.

    Raises:
        RecipeError: a scorer refuses its options.
        ScoreError: the module of a plug-in can't be imported.
    """
    return tuple(_build(setting, prompts, record, judges or {}) for setting in settings)


def shows_behaviour(
    setting: ScorerSettings,
    prompts: Sequence[Prompt],
    model: TextModel,
    judges: Judges | None = None,
) -> list[bool | None]:
    """Return whether a model shows the behaviour at each prompt, by a scorer's test of one answer.

    None stands for answers that can't be judged; see `scorer.BehaviourTest`.

    Raises:
        RecipeError: the scorer has no such test.
    """
    prompt_sets = {setting.name: PromptSet(setting.name, tuple(prompts))}
    scorer = _build(setting, prompt_sets, False, judges or {})
    if not isinstance(scorer, BehaviourTest):
        raise RecipeError(
            f"scorer {setting.name!r} can't judge a single answer; name another scorer"
        )
    return scorer.shows(model)


def _build(
    setting: ScorerSettings, prompts: Mapping[str, PromptSet], record: bool, judges: Judges
) -> Scorer:
    if isinstance(setting, KeywordRate):
        return KeywordRateScorer(setting, prompts[setting.name], record)
    if isinstance(setting, KlDivergence):
        return KlDivergenceScorer(setting, prompts[setting.name])
    if isinstance(setting, RefusalLogOdds):
        return RefusalLogOddsScorer(setting, prompts[setting.name])
    if isinstance(setting, RefusalJudge):
        judge = judges.get(setting.name) or build_judge(setting)
        return RefusalJudgeScorer(setting, prompts[setting.name], judge)
    given = {"prompts": prompts[setting.name]} if setting.name in prompts else {}
    options = {"name": setting.name, "goal": setting.goal, **given, **setting.options}
    owner = f"scorer {setting.name!r} ({setting.kind})"
    scorer = checked_call(owner, resolve(setting.kind), options)
    if not isinstance(scorer, Scorer):
        raise RecipeError(
            f"scorer {setting.name!r}: {setting.kind} made a {type(scorer).__name__}, which lacks "
            "one of name, goal, prepare, score; see docs/extending.md"
        )
    return scorer
