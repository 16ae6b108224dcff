"""What a component of a block adds to the residual stream, and where that can be read in a model.

The contribution is the output of the module that owns the component's writer, or of the norm
between it and the stream. Knows nothing about prompts or directions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer

Places = Sequence[nn.Module | None]
"""Modules whose outputs are read; None where a layer has no such component: nothing is added."""


def contributing(model: nn.Module, writers: Sequence[Writer], layers: int) -> Places:
    """The modules that give contributions: all layers of the first component, then of the next.

    Args:
        model: The model.
        writers: As `architecture.find_writers` gives them.
        layers: Number of blocks.

    Raises:
        ModelError: several writers of a layer make up one component (experts one by one), so that
            no module gives what it adds.
    """
    found: list[nn.Module | None] = []
    for component in sorted({writer.component for writer in writers}):
        for layer in range(layers):
            own = [w for w in writers if (w.component, w.layer) == (component, layer)]
            names = {_place(writer) for writer in own}
            if len(names) > 1:
                raise ModelError(
                    f"direction.per_component: layer {layer} has {len(own)} writers of "
                    f"{component!r}, and no module that gives what they add together.\n"
                    "  Set direction.per_component = false for this model."
                )
            found.append(model.get_submodule(names.pop()) if names else None)
    return tuple(found)


def _place(writer: Writer) -> str:
    owner = writer.parameter.rpartition(".")[0]
    return writer.outer_norm or writer.post_norm or owner


@contextmanager
def outputs_of(places: Places, take: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor | None]]:
    """What modules give while the body runs, in their order; None of one that isn't there.

    Args:
        places: The modules.
        take: From an output, `"... hidden"`, to what is wanted of it.
    """
    found: list[Tensor | None] = [None] * len(places)

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = take(output[0] if isinstance(output, tuple | list) else output)

        return hook

    modules = ((index, module) for index, module in enumerate(places) if module is not None)
    handles = [module.register_forward_hook(keep(index)) for index, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def stacked(found: Sequence[Tensor | None]) -> Tensor:
    """Outputs side by side, `"row place hidden"`; zeros where there is no module."""
    like = next(one for one in found if one is not None)
    nothing = torch.zeros_like(like)
    return torch.stack([nothing if one is None else one for one in found], dim=1)
