"""Calls of Ray actors by their class's own methods, so that an editor and mypy follow them.

    evaluation = call_actor(pool, PoolActor.evaluate_trial, plan, setup, per_pass)

Ray's handles answer to any name; these functions take the method itself, and check its arguments.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate

import ray

from ray_abliterate.cluster.replica_call import Parameters, Returned


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
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Returned]],
    *args: Parameters.args,
    **options: Parameters.kwargs,
) -> Returned:
    """Call an asynchronous method of an actor, and wait for its result; see `start_actor_call`.

    Raises:
        RayError: the actor died, or its method raised something.
    """
    returned: Returned = ray.get(start_actor_call(actor, method, *args, **options))
    return returned
