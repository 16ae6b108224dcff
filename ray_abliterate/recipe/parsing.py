"""Parsing of recipes: overrides from the command line, and errors in the recipe's own terms.

Knows pydantic; nothing about what is in a recipe.
"""

import difflib
import tomllib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ray_abliterate.errors import RecipeError

TAGS = (
    "keyword-rate",
    "kl-divergence",
    "refusal-log-odds",
    "refusal-judge",
    "multiple-choice",
    "over-refusal",
    "kl",
    "responses",
    "plugin",
)
"""Tags that pydantic puts into an error's path inside a tagged union; not part of the recipe."""

SECRET = ("secret_in_url", "not_a_variable")
"""Types of problems whose value may be a secret and is not shown."""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested dictionaries; the value is TOML, or otherwise a plain string.

    Raises:
        RecipeError: the override is not of that form, or its key leads into a value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(
            f"{override!r} is not an override; write key=value, such as search.trials=50"
        )
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    set_setting(values, key, value)


def set_setting(values: dict[str, Any], key: str, value: object) -> None:
    """Set one setting in nested dictionaries and lists, named as `a.b.0.c`.

    Raises:
        RecipeError: the name leads into a value, or past the end of a list.
    """
    node: Any = values
    *parents, last = key.split(".")
    for index, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"{key}: {'.'.join(parents[: index + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _position(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"{key}: {part!r} must be a number from 0 to {len(items) - 1}")
    return int(part)


def suggestion(word: str, known: tuple[str, ...] | list[str]) -> str:
    """Return ` Did you mean …?` with the known word that is nearest, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def explain_problems(source: str, error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return one line per problem, each with the setting's full name.

    Args:
        source: The file's name.
        error: The error that pydantic raised.
        root: The type of the whole recipe.
    """
    lines = []
    for problem in error.errors():
        path = [part for part in problem["loc"] if part not in TAGS]
        name = ".".join(str(part) for part in path) or "recipe"
        if problem["type"] == "extra_forbidden":
            siblings = _siblings(path, root)
            near = difflib.get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.5)
            full = ".".join([*map(str, path[:-1]), near[0]]) if near else ""
            hint = f" Did you mean {full}?" if near else f" Known: {', '.join(sorted(siblings))}."
            lines.append(f"{source}: {name} is not a setting.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{source}: {name} is missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = problem["input"]
            plain = isinstance(value, str | int | float | bool)
            shown = f" (found {value!r})" if plain and problem["type"] not in SECRET else ""
            lines.append(f"{source}: {name}: {message}{shown}")
    return lines


def _siblings(path: list[Any], root: type[BaseModel]) -> list[str]:
    """Return the settings in the section of `path`; of all kinds, where there are several."""
    models = [root]
    for part in path[:-1]:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:  # else a number in a list, or a key of a table of sections
            models = [m for field in fields for m in _models(field.annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    inner = [model for part in get_args(annotation) for model in _models(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation, *inner] if is_model else inner
