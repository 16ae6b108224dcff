"""Plug-ins: import what a recipe names as `module:attribute`, and call it with checked options.

Knows nothing about what the objects are.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ray_abliterate.errors import RecipeError, ScoreError


def resolve(spec: str) -> Any:
    """Import the object that `module:attribute` names.

    Raises:
        ScoreError: the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScoreError(
            f"{spec}: module {module_name!r} cannot be imported ({error}).\n"
            "  Code next to the recipe is found if the recipe's folder is on PYTHONPATH."
        ) from None
    if not hasattr(module, attribute):
        raise ScoreError(f"{spec}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def checked_call(owner: str, make: Any, options: Mapping[str, Any]) -> Any:
    """Call a function or class with options that are checked against its annotations.

    Args:
        owner: What the options belong to, for errors.
        make: The function or class.
        options: Its keyword arguments.

    Raises:
        RecipeError: an option is missing, unknown or of another type.
    """
    from pydantic import ValidationError, validate_call

    checked = validate_call(config={"arbitrary_types_allowed": True})
    try:
        if not inspect.isclass(make):
            return checked(make)(**options)
        initialisers = [vars(kind).get("__init__") for kind in make.__mro__]
        initialise = next(method for method in initialisers if method is not None)
        if not inspect.isfunction(initialise):  # a builtin, without annotations to check
            return make(**options)
        instance = object.__new__(make)
        checked(initialise)(instance, **options)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{owner}: {problems}") from None
    return instance
