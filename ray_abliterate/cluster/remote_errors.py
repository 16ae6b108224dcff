"""Errors from other processes, without Ray's wrapping."""

from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from ray_abliterate.errors import ModelError, RayAbliterateError, SearchError

DEATHS = (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
"""What Ray raises when a process has died, or can't be reached."""

PACKAGE_MISSING = "No module named 'ray_abliterate"
"""Part of Ray's message about a process that could not import this package."""
INSTALL = (
    "Install this version of it on every node of the cluster, or set PYTHONPATH to the absolute\n"
    "  path of a folder that holds it on all of them."
)
"""What to do about it."""


class ReplicaDied(SearchError):
    """A replica died over a call that is not repeated automatically."""


def unwrap(reference: Any) -> Any:
    """Return the value behind a reference, or raise the error that its process raised.

    Raises:
        ModelError: the process died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise original_error(error) from None
    except DEATHS as error:
        raise died_while_loading(error) from None


def died_while_loading(error: BaseException) -> ModelError:
    """Say why a replica's process ended before it had a model, and what to do about it."""
    if PACKAGE_MISSING in str(error):
        return ModelError(
            f"a replica's process can't import ray_abliterate on its node.\n  {INSTALL}"
        )
    return ModelError(
        "a replica died while it loaded the model, most likely for lack of memory.\n"
        "  Choose a smaller model or fewer replicas (model.replicas).\n"
        f"  {str(error).splitlines()[0]}"
    )


def original_error(error: RayTaskError) -> Exception:
    """Return the error that the other process raised if it is one of this package, else Ray's."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return type(cause)(*cause.args) if isinstance(cause, RayAbliterateError) else error


def describe_death(error: BaseException) -> str:
    """Say in a few words how a process ended."""
    if isinstance(error, OutOfMemoryError):
        return "its node ran out of memory"
    if isinstance(error, ActorUnavailableError):
        return "it can't be reached"
    return "its process died"


def one_line_reason(error: BaseException) -> str:
    """Return one line for the trial's record."""
    if isinstance(error, RayAbliterateError):
        return f"{type(error).__name__}: {error}"
    if PACKAGE_MISSING in str(error):
        return "its process can't import ray_abliterate"
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"
