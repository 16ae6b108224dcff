"""The TOML file as frozen pydantic values. No torch, no numpy."""

from ray_abliterate.recipe.direction import METHOD_NAMES, DirectionSettings, EnsembleMember
from ray_abliterate.recipe.recipe import (
    EditSettings,
    ModelSettings,
    Norm,
    PromptSettings,
    Quantization,
    Recipe,
    SearchSettings,
    SuiteFile,
)
from ray_abliterate.recipe.run import EvaluationSettings, RunSettings
from ray_abliterate.recipe.scorers import (
    KeywordRate,
    KlDivergence,
    PluginScorer,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.recipe.section import (
    COMPONENT_NAMES,
    Goal,
    PromptSource,
    Section,
    TableSource,
    WriterRow,
)
from ray_abliterate.recipe.space import INTERVALS, ComponentSpace, SpaceSettings
from ray_abliterate.recipe.suites import SuiteSettings

__all__ = [
    "COMPONENT_NAMES",
    "INTERVALS",
    "METHOD_NAMES",
    "ComponentSpace",
    "DirectionSettings",
    "EditSettings",
    "EnsembleMember",
    "EvaluationSettings",
    "Goal",
    "KeywordRate",
    "KlDivergence",
    "ModelSettings",
    "Norm",
    "PluginScorer",
    "PromptSettings",
    "PromptSource",
    "Quantization",
    "Recipe",
    "RefusalJudge",
    "RefusalLogOdds",
    "RunSettings",
    "ScorerSettings",
    "SearchSettings",
    "Section",
    "SpaceSettings",
    "SuiteFile",
    "SuiteSettings",
    "TableSource",
    "WriterRow",
]
