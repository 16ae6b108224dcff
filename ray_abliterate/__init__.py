"""Finds the direction of a behaviour in a language model, and the weight edit that removes it.

The public names are loaded when they are first used, so that importing the package is instant.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Directions": "directions",
    "Frontier": "frontier",
    "LanguageModel": "model",
    "Plan": "plan",
    "Profile": "plan",
    "Prompt": "prompts",
    "PromptSet": "prompts",
    "RayAbliterateError": "errors",
    "Recipe": "recipe",
    "Replica": "replica",
    "Residuals": "residuals",
    "RunDirectory": "rundir",
    "Score": "scoring",
    "Scorecard": "scoring",
    "Trial": "frontier",
    "WeightCache": "weights",
    "run": "run",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
