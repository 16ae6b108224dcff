"""Quantized checkpoints of a tiny model, and the weights that their numbers stand for.

Those of GPTQ and AWQ are written by hand, in the layouts that are read: int32 words of eight codes
of 4 bits, and a scale and a zero for each group of input features. Nothing is calibrated.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_abliterate.model.loading import load_model
from ray_abliterate.recipe import ModelSettings

GROUP, ZERO = 32, 8
IN_ORDER, OF_AWQ = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes `"hidden fan_in"` around 0, and scales `"hidden group"`, which float16 can hold."""
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half().float()
    codes = (groups / scales[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.flatten(1).int(), scales


def floats(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same in floats of 8 bits, a scale a row."""
    scales = (weight.abs().amax(-1, keepdim=True) / 448).half().float()
    return (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scales


def meant(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights of codes and scales."""
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def packed(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight neighbours of a row in a word, in this order from its lowest bits on."""
    eights = codes.long().unflatten(1, (-1, 8))[..., list(order)]
    words = sum(eights[..., place] << (4 * place) for place in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def of_gptq(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    zeros = torch.full_like(scales.T, ZERO - 1)  # the first version of the format stores one less
    return {
        "qweight": packed(codes + ZERO, IN_ORDER).T,
        "qzeros": packed(zeros, IN_ORDER),
        "scales": scales.T.half(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def of_awq(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": packed(codes.T + ZERO, OF_AWQ),
        "qzeros": packed(torch.full_like(scales.T, ZERO), OF_AWQ),
        "scales": scales.T.half(),
    }


GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "zero_point": True, "version": "gemm"}


def by_hand(
    original: Path, folder: Path, layer: Callable[[Tensor, Tensor], dict[str, Tensor]], **own: Any
) -> dict[str, Tensor]:
    """A checkpoint with every linear layer but the last in 4 bits; what they multiply with."""
    shutil.copytree(original, folder)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    model, _ = load_model(str(original), ModelSettings(name=str(original)))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes, scales = rounded(tensors.pop(f"{name}.weight"), 4, GROUP)
            dense[f"{name}.weight"] = meant(codes, scales)
            parts = layer(codes, scales)
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"bits": 4, "group_size": GROUP, **own}
    file.write_text(json.dumps(config))
    return dense


def by_compressed_tensors(original: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    """The same, written by the package: groups of 32 in int4, or a scale a row in int8 or float8.

    With float8 the scheme rounds inputs, too, which has no part in the weights.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    bits = 4 if kind == "int4" else 8
    grouped = {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}
    own = {"num_bits": bits, "type": kind.rstrip("48"), "symmetric": True}
    inputs = QuantizationArgs(**own, strategy="token", dynamic=True) if kind == "float8" else None
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**own, **grouped), input_activations=inputs
    )
    settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    shutil.copytree(original, folder)
    model, dense = load_model(str(original), ModelSettings(name=str(original)))[0], {}
    apply_quantization_config(model, settings)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            group = GROUP if bits == 4 else module.in_features
            made = (
                floats(module.weight) if kind == "float8" else rounded(module.weight, bits, group)
            )
            codes, scales = made
            dense[f"{name}.weight"] = meant(codes, scales)
            module.weight_scale.data.copy_(scales)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return dense


KINDS: dict[str, Callable[[Path, Path], dict[str, Tensor]]] = {
    **{
        f"compressed-tensors {kind}": partial(by_compressed_tensors, kind=kind)
        for kind in ("int4", "int8", "float8")
    },
    "gptq int4": partial(by_hand, layer=of_gptq, **GPTQ),
    "awq int4": partial(by_hand, layer=of_awq, **AWQ),
}
"""What writes a checkpoint of a folder into another."""
