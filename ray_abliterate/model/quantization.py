"""Quantized models: what a recipe may ask for, what checkpoints may be, and what either needs.

Knows nothing about edits: how quantized layers are edited is in `beside`.
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
"""Weights of a row that share a scale, with torchao-int4."""

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
"""Modules that a method needs, and what pip installs them as."""


UNPACKED = "unpacked_from"
"""Attribute of a model that was quantized and is not any more: how."""


def quantization_method(config: Any) -> str:
    """The method that a checkpoint is quantized with; empty if it is not."""
    for own in (config, config.get_text_config(decoder=True)):
        found = getattr(own, "quantization_config", None)
        if found:
            values = found if isinstance(found, dict) else found.to_dict()
            return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    return ""


def remove_quantization(config: Any) -> None:
    """Have a configuration be that of the model before it was quantized."""
    for own in (config, config.get_text_config(decoder=True)):
        if hasattr(own, "quantization_config"):
            del own.quantization_config


def refuse_unloadable(name: str, config: Any, wanted: Quantization | None) -> None:
    """Refuse what can't be loaded, before weights are read.

    Args:
        name: The checkpoint's, for messages.
        config: Its configuration.
        wanted: What the recipe asks for.

    Raises:
        ModelError: it is quantized already, a package is missing, or its layers don't divide into
            groups.
    """
    method = quantization_method(config)
    if method and wanted:
        raise ModelError(
            f"model.quantization = {wanted!r}, but {name} is quantized already ({method}).\n"
            "  Leave model.quantization out to search on it as it is, or name the full-precision "
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
    """Make sure that a method's packages are there.

    Raises:
        ModelError: one is not; says how to install it.
    """
    modules, install = PACKAGES.get(method, ((), ""))
    for module in modules:
        reveal_package(module)
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise ModelError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed.\n  pip install {install}"
        )


def refuse_uneven(name: str, config: Any) -> None:
    """Make sure that rows of weights divide into the groups of torchao-int4.

    Raises:
        ModelError: they don't.
    """
    text = config.get_text_config(decoder=True)
    for key in ("hidden_size", "intermediate_size"):
        width = getattr(text, key, None)
        if isinstance(width, int) and width % GROUP:
            raise ModelError(
                f"model.quantization = 'torchao-int4' takes {GROUP} weights of a row together, "
                f"and {name} has {key} = {width}.\n  Choose nf4 or torchao-int8."
            )


def quantization_config(wanted: Quantization, dtype: torch.dtype) -> Any:
    """What transformers is told: one configuration on every device, so that results compare.

    Args:
        wanted: What the recipe asks for.
        dtype: What layers compute in.
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


def unpack(config: Any) -> str:
    """Have a compressed-tensors checkpoint unpacked as it is loaded, and say how it was quantized.

    transformers would leave its layers without weights until the whole model has run once, and
    unpack them then. Unpacked, they are plain linear layers: memory is the original's, and inputs
    are not rounded where the checkpoint's scheme would have them be. Of other methods: empty.

    Args:
        config: The checkpoint's configuration; what it says of the method is changed.
    """
    if quantization_method(config) != "compressed-tensors":
        return ""
    found: set[str] = set()
    for own in (config, config.get_text_config(decoder=True)):
        values = getattr(own, "quantization_config", None)
        if isinstance(values, dict):
            values["dequantize"] = True
            groups = [g for g in values.get("config_groups", {}).values() if isinstance(g, dict)]
            weights = [group["weights"] for group in groups if group.get("weights")]
            found |= {f"{w.get('type', '')}{w.get('num_bits', '')}" for w in weights}
    return f"{' '.join(['compressed-tensors', *sorted(found)])}, unpacked"


def stop_repacking(module: nn.Module) -> None:
    """Keep 4-bit layers from being packed anew by CPUs with bfloat16 units.

    Packed ones compute in bfloat16 whatever the model's dtype, so that replicas on two kinds of
    CPU would differ; and asking bitsandbytes (0.50) for their state turns the scales round.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def compute_dtype(config: Any, wanted: str) -> torch.dtype:
    """What a checkpoint's layers compute in: the recipe's dtype, or its own."""
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    for own in (config, config.get_text_config(decoder=True)):
        if isinstance(getattr(own, "dtype", None), torch.dtype):
            found: torch.dtype = own.dtype
            return found
    return torch.float32


# What is loaded


def describe_quantization(module: Any) -> str:
    """How a loaded model is quantized: the method, and the bits of a weight if they are known.

    One that was unpacked has the numbers that quantization left of it.
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
    """The plain tensors that a tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def bytes_of(tensor: Tensor) -> int:
    """Memory of a tensor, quantized or not."""
    return sum(t.numel() * t.element_size() for t in plain_tensors(tensor))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
