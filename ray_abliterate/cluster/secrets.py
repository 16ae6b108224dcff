"""The driver's Hub token and judges' keys, carried to replicas on other nodes.

On a cluster that was joined, replicas have the environment of their node, not the driver's. A Ray
runtime environment would carry the token, and show it: in the dashboard, in `ray list`, in logs.
So it is an argument of the replica's constructor, in a type that hides it. An argument, not an
object reference: objects can be spilled to disk.
"""

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

HUB_TOKEN = "HF_TOKEN"
"""The variable in which the Hub's libraries look first, at each call."""


class Secrets:
    """Values for environment variables. Its text shows none of them; pickled, it carries them."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = dict(values or {})

    def __repr__(self) -> str:
        return f"Secrets({', '.join(sorted(self._values))})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, str]]]:
        return Secrets, (self._values,)

    def __bool__(self) -> bool:
        return bool(self._values)

    def hand_over(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Set the variables, also those that are set, so that all replicas read as one user."""
        environment.update(self._values)


def drivers_secrets(variables: Iterable[str] = ()) -> Secrets:
    """Collect what a replica needs to read a gated model: this process's Hub token, if any.

    The token is looked up as the Hub's own library does, in the environment or in the file that
    `hf auth login` writes. Nothing else of the environment travels but what is named.

    Args:
        variables: Names of environment variables that hold keys; one that is not set is left out.
    """
    from huggingface_hub import get_token

    values = {HUB_TOKEN: get_token(), **{name: os.environ.get(name) for name in variables}}
    return Secrets({name: value for name, value in values.items() if value})
