"""What a component of a block adds to the residual stream, and which module's output that is.

A component is attention, the MLP, or the like; what it adds is the output of the module that owns
its writer, or of the norm between that module and the stream. Knows nothing about prompts or
directions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer

ComponentModules = Sequence[nn.Module | None]
"""Modules whose outputs are read; None where a layer has no such component, which adds nothing."""


def component_modules(model: nn.Module, writers: Sequence[Writer], layers: int) -> ComponentModules:
    """Return the modules whose outputs components add to the stream, component by component.

    All layers of the first component come first, then all of the next.

    Args:
        model: The transformers model.
        writers: Its writers, from `architecture.find_writers`.
        layers: The number of its blocks.

    Raises:
        ModelError: several writers of a layer make up one component (experts one by one), so that
            no module outputs what it adds.
    """
    modules: list[nn.Module | None] = []
    for component in sorted({writer.component for writer in writers}):
        for layer in range(layers):
            of_layer = [w for w in writers if (w.component, w.layer) == (component, layer)]
            names = {_module_name(writer) for writer in of_layer}
            if len(names) > 1:
                raise ModelError(
                    f"direction.per_component: layer {layer} has {len(of_layer)} writers of "
                    f"{component!r}, and no module whose output is what they add together.\n"
                    "  Set direction.per_component = false for this model."
                )
            modules.append(model.get_submodule(names.pop()) if names else None)
    return tuple(modules)


def _module_name(writer: Writer) -> str:
    owner = writer.parameter.rpartition(".")[0]
    return writer.outer_norm or writer.post_norm or owner


@contextmanager
def capture_outputs(
    modules: ComponentModules, read: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor | None]]:
    """Capture what modules output while the body runs, in their order; None for a missing module.

    Args:
        modules: The modules.
        read: Turns an output, `"... hidden"`, into what is wanted of it.
    """
    outputs: list[Tensor | None] = [None] * len(modules)

    def capture(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = read(output[0] if isinstance(output, tuple | list) else output)

        return hook

    handles = [
        module.register_forward_hook(capture(index))
        for index, module in enumerate(modules)
        if module is not None
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def stack_outputs(outputs: Sequence[Tensor | None]) -> Tensor:
    """Stack outputs to `"row module hidden"`; a missing module adds zeros.

    Args:
        outputs: Each `"row hidden"`, from `capture_outputs`.
    """
    like = next(output for output in outputs if output is not None)
    zeros = torch.zeros_like(like)
    return torch.stack([zeros if output is None else output for output in outputs], dim=1)
