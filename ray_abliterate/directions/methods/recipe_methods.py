"""The methods that a recipe names: which functions they are, what they need, whether they exist."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ray_abliterate.directions.methods.inputs import NEEDS, Layer, Need, Sample, demand_of
from ray_abliterate.directions.methods.principal_components import neutral_components
from ray_abliterate.directions.methods.registry import METHODS
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.recipe.plugins import resolve


class WeightedMethod(NamedTuple):
    """One method of a recipe, or of its ensemble.

    Attributes:
        name: As the recipe names it.
        weight: Its weight in the ensemble; 1 outside one.
        function: What computes raw vectors.
        options: Keyword arguments of the function.
    """

    name: str
    weight: float
    function: Callable[..., Any]
    options: Mapping[str, Any]


def weighted_methods(settings: DirectionSettings) -> list[WeightedMethod]:
    """Return the recipe's methods: one, or those of an ensemble."""
    if settings.method != "ensemble":
        function = find_method(settings.method)
        return [WeightedMethod(settings.method, 1.0, function, settings.options)]
    return [
        WeightedMethod(member.method, member.weight, find_method(member.method), member.options)
        for member in settings.ensemble
    ]


def find_method(name: str) -> Callable[..., Any]:
    """Return a method of this package, or the function that `module:function` names.

    Raises:
        ScoreError: there is no such module, or nothing of that name in it.
        RecipeError: the name is not that of a function.
    """
    method: Any = METHODS[name] if name in METHODS else resolve(name)
    if not callable(method):
        raise RecipeError(f"direction.method: {name} is not a function, but {method!r}")
    function: Callable[..., Any] = method
    return function


def need_of(settings: DirectionSettings) -> Need:
    """Return the most that the recipe's methods need to know of residuals."""
    needs = [demand_of(method.function).need for method in weighted_methods(settings)]
    if settings.project_out_components:
        needs.append(demand_of(neutral_components).need)
    return max(needs, key=NEEDS.index)


def rows_per_layer(settings: DirectionSettings) -> int:
    """Return how many vectors each layer multiplies every writer with: directions, and the spared.

    A method that finds several directions states how many in an option or default named `rank`.
    """
    rank = 1
    if settings.method != "ensemble":
        (method,) = weighted_methods(settings)
        parameters = inspect.signature(method.function).parameters
        if "rank" in parameters:
            rank = int(method.options.get("rank", parameters["rank"].default))
    return rank + settings.biproject


def refuse_unknown_methods(settings: DirectionSettings) -> None:
    """Make sure, before a model is loaded, that methods exist and accept their options.

    Methods of this package are also tried, on a handful of numbers.

    Raises:
        ScoreError: a module or function is not there.
        RecipeError: a method has no option of that name, or does not accept its value.
    """
    for name, _, function, options in weighted_methods(settings):
        types = _option_types(function)
        for option, value in options.items():
            if types is not None and option not in types:
                has = f"it has {', '.join(types)}" if types else "it has none"
                raise RecipeError(f"direction.options: {name} has no option {option!r}; {has}")
            _refuse_other_type(f"{name}.{option}", value, (types or {}).get(option, Any))
        if name in METHODS:
            _try_method(name, function, options)


def _option_types(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the types of a method's options by name; None if it takes any."""
    parameters = list(inspect.signature(function).parameters.values())[2:]  # after the two sets
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    # an annotation that is a string could not be evaluated here
    return {
        one.name: Any
        if one.annotation is one.empty or isinstance(one.annotation, str)
        else one.annotation
        for one in parameters
    }


def _refuse_other_type(option: str, value: Any, expected: Any) -> None:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(expected).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise RecipeError(f"direction.options: {option} = {value!r}: {problem}") from None


def _try_method(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    numbers = torch.arange(24.0).reshape(2, 4, 3).sin()  # (set, prompt, hidden)
    try:
        Layer(Sample(numbers[0], 3), Sample(numbers[1], 3)).find(function, **options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"direction.options: {name}: {error}") from None
