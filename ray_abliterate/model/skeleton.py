"""A model without its weights: names, shapes and types, on the meta device.

Building one takes a second and a few megabytes, whatever the model's size.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.loading import auto_class, loading_advice, refuse_quantized
from ray_abliterate.model.quantization import remove_quantization
from ray_abliterate.recipe import ModelSettings


def build_skeleton(
    config: Any, trust_remote_code: bool = False, kind: type[nn.Module] | None = None
) -> Any:
    """Return the transformers model that a configuration describes, without a single weight.

    Args:
        config: The transformers configuration.
        trust_remote_code: Whether code that comes with the model may run.
        kind: The model's class; by default the one that `loading` would load.
    """
    from transformers.initialization import meta_device_safe_creation_ops

    with torch.device("meta"), meta_device_safe_creation_ops():
        if kind is not None:
            module: Any = kind(config)
        else:
            module = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return module.eval().requires_grad_(False)


def skeleton_of_folder(folder: Path, settings: ModelSettings, unquantized: bool = False) -> Any:
    """Return the skeleton of a model folder.

    Args:
        folder: A folder with a `config.json`.
        settings: Whether code that comes with the model may run.
        unquantized: Return a quantized model as it was before; otherwise such a model is refused.

    Raises:
        ModelError: the folder holds no model that transformers knows, or a quantized one.
    """
    import transformers

    allowed = settings.trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=allowed)
        if unquantized:
            remove_quantization(config)
        refuse_quantized(str(folder), config)
        return build_skeleton(config, allowed)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(loading_advice(str(folder), settings, error)) from error


def unquantized_skeleton(module: Any) -> nn.Module:
    """Return the skeleton of a loaded model as it was before it was quantized.

    A model that is not quantized is returned itself, weights and all: its names are the same.
    """
    if getattr(module, "hf_quantizer", None) is None:
        return module  # type: ignore[no-any-return]
    config = copy.deepcopy(module.config)
    remove_quantization(config)
    skeleton: nn.Module = build_skeleton(config, kind=type(module))
    return skeleton


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Give one parameter or buffer of a skeleton its values.

    Args:
        module: The skeleton.
        name: The dotted name of the parameter or buffer.
        value: Its values.
    """
    owner_name, _, key = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if key in dict(owner.named_buffers(recurse=False)):
        setattr(owner, key, value)
    else:
        setattr(owner, key, nn.Parameter(value, requires_grad=False))
