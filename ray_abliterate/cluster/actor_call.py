"""Calls of Ray actors by their class's own methods, so that an editor and mypy follow them.

    evaluation = call_actor(pool, PoolActor.evaluate_trial, plan, setup, per_pass)

Ray's handles answer to any name; these functions take the method itself, and check its arguments.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


def start_actor_call(
    actor: Any,
    method: Callable[Concatenate[Any, Parameters], Any],
    *args: Parameters.args,
    **options: Parameters.kwargs,
) -> Any:
    """Start a method of an actor, and return Ray's reference to its result.

    Args:
        actor: Ray's handle.
        method: A method of the actor's class, such as `PoolActor.evaluate_trial`.
        args: The method's arguments.
        options: The method's keyword arguments.
    """
    return getattr(actor, method.__name__).remote(*args, **options)


def call_actor(
    actor: Any,
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Value]],
    *args: Parameters.args,
    **options: Parameters.kwargs,
) -> Value:
    """Call an asynchronous method of an actor, and wait for its result; see `start_actor_call`.

    Raises:
        RayError: the actor died, or its method raised something.
    """
    value: Value = ray.get(start_actor_call(actor, method, *args, **options))
    return value
