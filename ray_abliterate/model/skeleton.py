"""A model without its weights: names, shapes and types, on the meta device.

Building it takes a second and a few megabytes, whatever the model's size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.loading import advice, auto_class, refuse_quantized
from ray_abliterate.model.quantization import forget
from ray_abliterate.recipe import ModelSettings


def build_skeleton(folder: Path, settings: ModelSettings, unquantized: bool = False) -> Any:
    """The transformers model of a folder, without a single weight.

    Args:
        folder: Has a `config.json`.
        settings: Whether code that comes with the model may run.
        unquantized: Of a quantized model, what it was before; else such a one is refused.

    Raises:
        ModelError: the folder holds no model that transformers knows, or a quantized one.
    """
    import transformers
    from transformers.initialization import meta_device_safe_creation_ops

    allowed = settings.trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=allowed)
        if unquantized:
            forget(config)
        refuse_quantized(str(folder), config)
        with torch.device("meta"), meta_device_safe_creation_ops():
            module = auto_class(config).from_config(config, trust_remote_code=allowed)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(advice(str(folder), settings, error)) from error
    return module.eval().requires_grad_(False)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give one parameter or buffer of a skeleton its values."""
    owner_name, _, key = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if key in dict(owner.named_buffers(recurse=False)):
        setattr(owner, key, value)
    else:
        setattr(owner, key, nn.Parameter(value, requires_grad=False))
