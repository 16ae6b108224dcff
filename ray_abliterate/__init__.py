"""Finds the direction of a behaviour in a language model, and the weight edit that removes it.

The names below are the public API; each is loaded when it is first used, so that importing the
package is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ray_abliterate.version import __version__

if TYPE_CHECKING:
    from ray_abliterate.ablation.weight_cache import WeightCache
    from ray_abliterate.data.prompts import Prompt, PromptSet
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.directions.methods.inputs import needs
    from ray_abliterate.directions.residuals.residual_set import Residuals
    from ray_abliterate.errors import RayAbliterateError
    from ray_abliterate.evaluation.scorers.scorer import Scorer
    from ray_abliterate.evaluation.streaming.evaluator import StreamingEvaluator
    from ray_abliterate.evaluation.suites.suite import Measure, Suite, SuiteChunk
    from ray_abliterate.export.export import export_trial
    from ray_abliterate.model.architecture import find_writers
    from ray_abliterate.model.language_model import LanguageModel
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.python_api import compute_directions, resume_run, run_recipe
    from ray_abliterate.recipe.recipe import Recipe
    from ray_abliterate.replica.replica import Replica
    from ray_abliterate.search.frontier import Frontier, Trial
    from ray_abliterate.search.plan import Plan, Profile
    from ray_abliterate.search.score import Score, Scorecard, mean_interval, wilson

__all__ = [
    "Directions",
    "Frontier",
    "LanguageModel",
    "Measure",
    "Plan",
    "Profile",
    "Prompt",
    "PromptSet",
    "RayAbliterateError",
    "Recipe",
    "Replica",
    "Residuals",
    "RunDirectory",
    "Score",
    "Scorecard",
    "Scorer",
    "StreamingEvaluator",
    "Suite",
    "SuiteChunk",
    "Trial",
    "WeightCache",
    "__version__",
    "compute_directions",
    "export_trial",
    "find_writers",
    "mean_interval",
    "needs",
    "resume_run",
    "run_recipe",
    "wilson",
]

_HOMES = {
    "Directions": "directions.directions",
    "Frontier": "search.frontier",
    "LanguageModel": "model.language_model",
    "Measure": "evaluation.suites.suite",
    "Plan": "search.plan",
    "Profile": "search.plan",
    "Prompt": "data.prompts",
    "PromptSet": "data.prompts",
    "RayAbliterateError": "errors",
    "Recipe": "recipe.recipe",
    "Replica": "replica.replica",
    "Residuals": "directions.residuals.residual_set",
    "RunDirectory": "pipeline.directory",
    "Score": "search.score",
    "Scorecard": "search.score",
    "Scorer": "evaluation.scorers.scorer",
    "StreamingEvaluator": "evaluation.streaming.evaluator",
    "Suite": "evaluation.suites.suite",
    "SuiteChunk": "evaluation.suites.suite",
    "Trial": "search.frontier",
    "WeightCache": "ablation.weight_cache",
    "compute_directions": "pipeline.python_api",
    "export_trial": "export.export",
    "find_writers": "model.architecture",
    "mean_interval": "search.score",
    "needs": "directions.methods.inputs",
    "resume_run": "pipeline.python_api",
    "run_recipe": "pipeline.python_api",
    "wilson": "search.score",
}
"""The module of each public name, within the package."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib"})
