"""The TOML file as frozen pydantic values. No torch, no numpy."""

from ray_abliterate.recipe.direction import METHOD_NAMES, DirectionSettings, EnsembleMember
from ray_abliterate.recipe.model import (
    COMPONENT_NAMES,
    Component,
    ModelSettings,
    Quantization,
    WriterSettings,
)
from ray_abliterate.recipe.recipe import Recipe, SuiteFile
from ray_abliterate.recipe.run import EvaluationSettings, RunSettings
from ray_abliterate.recipe.scorers import (
    KeywordRate,
    KlDivergence,
    PluginScorer,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.recipe.search import EditSettings, Norm, SearchSettings
from ray_abliterate.recipe.section import Goal, Section
from ray_abliterate.recipe.sources import PromptSettings, PromptSource, TableSource
from ray_abliterate.recipe.space import INTERVALS, ComponentSpace, SpaceSettings
from ray_abliterate.recipe.suites import SuiteSettings

__all__ = [
    "COMPONENT_NAMES",
    "INTERVALS",
    "METHOD_NAMES",
    "Component",
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
    "WriterSettings",
]
