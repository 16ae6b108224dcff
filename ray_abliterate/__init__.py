"""Finds the direction of a behaviour in a language model, and the weight edit that removes it.

The public names are loaded when they are first used, so that importing the package is instant.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Directions": "directions.directions",
    "Frontier": "search.frontier",
    "LanguageModel": "model.language_model",
    "Plan": "search.plan",
    "Profile": "search.plan",
    "Prompt": "data.prompts",
    "PromptSet": "data.prompts",
    "RayAbliterateError": "errors",
    "Recipe": "recipe",
    "Replica": "replica.replica",
    "Residuals": "directions.residuals.residual_set",
    "RunDirectory": "pipeline.directory",
    "Score": "search.score",
    "Scorecard": "search.score",
    "Trial": "search.frontier",
    "WeightCache": "ablation.weight_cache",
    "run": "pipeline.run",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
