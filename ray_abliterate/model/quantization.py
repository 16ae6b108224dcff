"""Quantized models: what a recipe may ask for, what checkpoints may be, and what either needs.

Knows nothing about edits; quantized layers are edited by hooks (`ablation/layer_hooks.py`).
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.optional_packages import reveal_package
from ray_abliterate.recipe import Quantization

GROUP = 32
"""Consecutive weights of a row that share a scale, with torchao-int4."""

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # unknown to torch's type stubs

PACKAGES = {
    "bitsandbytes": (("bitsandbytes",), "'ray-abliterate[bitsandbytes]'"),
    "torchao": (("torchao",), "'ray-abliterate[torchao]'"),
    "gptq": (("gptqmodel", "optimum"), "gptqmodel optimum"),
    "awq": (("gptqmodel",), "gptqmodel"),
    "auto-round": (("auto_round",), "auto-round"),
    "aqlm": (("aqlm",), "'aqlm[gpu,cpu]'"),
    "compressed-tensors": (("compressed_tensors",), "'ray-abliterate[compressed-tensors]'"),
    "eetq": (("kernels",), "kernels"),
    "hqq": (("hqq",), "hqq"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
    "mxfp4": (("kernels",), "kernels"),
    "spqr": (("spqr_quant",), "'spqr_quant[gpu]'"),
    "vptq": (("vptq",), "vptq"),
}
"""Modules that each quantization method needs, and what `pip install` calls them."""

UNPACKED = "unpacked_from"
"""Attribute of a model that was unpacked when it was loaded: how it had been quantized."""


def quantization_method(config: Any) -> str:
    """Return the method that a checkpoint is quantized with; empty if it is not."""
    for part in (config, config.get_text_config(decoder=True)):
        declared = getattr(part, "quantization_config", None)
        if declared:
            values = declared if isinstance(declared, dict) else declared.to_dict()
            return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    return ""


def remove_quantization(config: Any) -> None:
    """Change a configuration to that of the model before it was quantized."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def refuse_unloadable(name: str, config: Any, wanted: Quantization | None) -> None:
    """Refuse a checkpoint that can't be loaded as the recipe asks, before weights are read.

    Args:
        name: The checkpoint's name, for messages.
        config: Its transformers configuration.
        wanted: The quantization that the recipe asks for.

    Raises:
        ModelError: it is quantized already, a package is missing, or its layers don't divide into
            groups.
    """
    method = quantization_method(config)
    if method and wanted:
        raise ModelError(
            f"model.quantization = {wanted!r}, but {name} is quantized already ({method}).\n"
            "  Remove model.quantization to search on it as it is, or give the full-precision "
            "original."
        )
    if not wanted:
        refuse_missing_packages(f"{name} ({method})", method)
        return
    library = "torchao" if wanted.startswith("torchao") else "bitsandbytes"
    refuse_missing_packages(f"model.quantization = {wanted!r}", library)
    if wanted == "torchao-int4":
        refuse_uneven(name, config)


def refuse_missing_packages(what: str, method: str) -> None:
    """Refuse a quantization method whose packages are not installed.

    Args:
        what: What needs them, for the message.
        method: The method, a key of `PACKAGES`.

    Raises:
        ModelError: one is missing; the message says how to install it.
    """
    modules, install = PACKAGES.get(method, ((), ""))
    for module in modules:
        reveal_package(module)
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        raise ModelError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed.\n  pip install {install}"
        )


def refuse_uneven(name: str, config: Any) -> None:
    """Refuse a model whose rows don't divide into the groups of torchao-int4.

    Raises:
        ModelError: a width is not a multiple of `GROUP`.
    """
    text = config.get_text_config(decoder=True)
    for key in ("hidden_size", "intermediate_size"):
        width = getattr(text, key, None)
        if isinstance(width, int) and width % GROUP:
            raise ModelError(
                f"model.quantization = 'torchao-int4' takes {GROUP} weights of a row together, "
                f"but {name} has {key} = {width}.\n  Choose nf4 or torchao-int8."
            )


def quantization_config(wanted: Quantization, dtype: torch.dtype) -> Any:
    """Return the configuration for transformers: the same on every device, so that results compare.

    Args:
        wanted: The quantization that the recipe asks for.
        dtype: The dtype that layers compute in.
    """
    import transformers

    if wanted == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if wanted == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if wanted == "torchao-int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(INT4, PerGroup(GROUP)))


def request_unpacking(config: Any) -> str:
    """Let a compressed-tensors checkpoint be unpacked while it is loaded.

    transformers would leave its layers without weights until the whole model has run once, and
    unpack them then. Unpacked, they are plain linear layers: memory is the original's, and inputs
    are not rounded where the checkpoint's scheme would have them be.

    Args:
        config: The checkpoint's configuration; its quantization is changed.

    Returns:
        How the checkpoint was quantized, such as `compressed-tensors int4, unpacked`; empty for
        other methods, which are left as they are.
    """
    if quantization_method(config) != "compressed-tensors":
        return ""
    number_types: set[str] = set()
    for part in (config, config.get_text_config(decoder=True)):
        values = getattr(part, "quantization_config", None)
        if isinstance(values, dict):
            values["dequantize"] = True
            groups = [g for g in values.get("config_groups", {}).values() if isinstance(g, dict)]
            weights = [group["weights"] for group in groups if group.get("weights")]
            number_types |= {f"{w.get('type', '')}{w.get('num_bits', '')}" for w in weights}
    return f"{' '.join(['compressed-tensors', *sorted(number_types)])}, unpacked"


def stop_repacking(module: nn.Module) -> None:
    """Keep CPUs with bfloat16 units from repacking 4-bit layers.

    Repacked layers compute in bfloat16 whatever the model's dtype, so that replicas on two kinds of
    CPU would differ; and reading their state from bitsandbytes (0.50) inverts the scales.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def compute_dtype(config: Any, wanted: str) -> torch.dtype:
    """Return the dtype that a checkpoint's layers compute in: the recipe's, or its own.

    Args:
        config: The checkpoint's configuration.
        wanted: The recipe's dtype by name, or `auto`.
    """
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    for part in (config, config.get_text_config(decoder=True)):
        if isinstance(getattr(part, "dtype", None), torch.dtype):
            dtype: torch.dtype = part.dtype
            return dtype
    return torch.float32


def describe_quantization(module: Any) -> str:
    """Return how a loaded model is quantized: the method, and the bits of a weight if known.

    An unpacked model counts as quantized, because its numbers are the rounded ones.
    """
    if unpacked := getattr(module, UNPACKED, ""):
        return str(unpacked)
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is None:
        return ""
    config = quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if getattr(config, "load_in_4bit", False):
        return f"{method} {config.bnb_4bit_quant_type}"
    if getattr(config, "load_in_8bit", False):
        return f"{method} int8"
    if method == "torchao":
        kind = type(config.quant_type).__name__
        if getattr(config.quant_type, "weight_dtype", None) == INT4:
            kind = "int4"
        return f"torchao {'int8' if kind == 'Int8WeightOnlyConfig' else kind}"
    bits = getattr(config, "bits", None)
    return f"{method} int{bits}" if bits else method


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of: codes and scales of a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor, quantized or not."""
    return sum(t.numel() * t.element_size() for t in plain_tensors(tensor))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
