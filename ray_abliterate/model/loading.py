"""Loads a model and its tokenizer from a folder or the Hub, and says what went wrong.

Safetensors only; code that comes with a model runs only if the recipe allows it.
"""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_abliterate.data.hub import MODEL_NAME
from ray_abliterate.errors import ModelError
from ray_abliterate.model import quantization
from ray_abliterate.recipe import ModelSettings

log = logging.getLogger(__name__)

NOISY = ("accelerate.big_modeling", "bitsandbytes", "torchao", "torch.utils._pytree")
"""Libraries that warn of what is as it should be: kernels of other devices, casts, weights on
disk."""


HUB_NAME = re.compile(rf"{MODEL_NAME.pattern}|[A-Za-z0-9][\w.\-]*", re.ASCII)
"""Names of models that the Hub can have: some old ones have no owner."""


def device_for(settings: ModelSettings) -> str:
    """Return where a replica's model goes: `auto` (spread), `cuda`, `mps` or `cpu`."""
    if (settings.gpus_per_replica or 0) > 1 or settings.max_memory:
        return "auto"
    if settings.gpus_per_replica == 0:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def refuse_missing_model(name: str, elsewhere: bool = False, field: str = "model.name") -> None:
    """Refuse a name that is neither a model folder nor one that the Hub could know.

    Args:
        name: The model's name.
        elsewhere: Accept an absolute path that this machine lacks; others may have it.
        field: The setting that gave the name, for the message.

    Raises:
        ModelError: no model can be there.
    """
    folder, named = Path(name), f"{field} = {name!r}"
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = "Give the folder that the model's config.json is in."
        if (folder / "adapter_config.json").exists():
            hint = "It holds an adapter; give the model that the adapter was merged into."
        elif any(folder.glob("*.gguf")):
            hint = "GGUF files can't be edited; give the model that they were converted from."
        raise ModelError(f"{named} is not a model folder: it has no config.json.\n  {hint}")
    if folder.is_file():
        raise ModelError(f"{named} is a file.\n  Give the folder with the model's config.json.")
    if folder.exists() or HUB_NAME.fullmatch(name) or (elsewhere and folder.is_absolute()):
        return
    raise ModelError(
        f"{named}: there is no such folder (looked for in {Path.cwd()}), and the Hub has no such "
        "names.\n"
        "  Give a folder with config.json, a Hub name such as Qwen/Qwen3-4B-Instruct-2507, or demo."
    )


def load_model(source: str, settings: ModelSettings) -> tuple[nn.Module, Any]:
    """Load a model, ready to run on its device, and its tokenizer.

    Args:
        source: A local folder or a Hub name, from `source.resolve_model`.
        settings: Revision, dtype, device and what is allowed.

    Raises:
        ModelError: anything that a user can fix; the message names the next step.
    """
    import transformers

    _quiet()
    common: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    refuse_missing_model(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **common)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
        quantization.refuse_unloadable(source, config, settings.quantization)
        options = {**_placement(settings), **_quantizing(config, settings)}
        unpacked = quantization.request_unpacking(config)
        scratch = tempfile.TemporaryDirectory(prefix="ray_abliterate-")
        model, report = auto_class(config).from_pretrained(
            source,
            config=config,
            dtype=settings.dtype,
            use_safetensors=True,
            output_loading_info=True,
            offload_folder=scratch.name,
            **common,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit on the GPU ({error}).\n"
            "  Set model.gpus_per_replica = 2 to spread it, or choose a smaller model."
        ) from None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(loading_advice(source, settings, error)) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"{source} lacks {len(names)} of the model's weights ({', '.join(names[:3])}, …), "
            "which would be random.\n  Download it again, or choose a complete checkpoint."
        )
    quantization.stop_repacking(model)
    setattr(model, quantization.UNPACKED, unpacked)
    if "device_map" not in options:
        model.to(device_for(settings))
    else:
        model.offload_folder = scratch  # deleted along with the model
    return model.eval().requires_grad_(False), tokenizer


def refuse_quantized(source: str, config: Any) -> None:
    """Refuse a quantized checkpoint as the source of an export.

    Only full-precision weights can be written: an edit would change quantized numbers without
    their scales.

    Raises:
        ModelError: the checkpoint is quantized.
    """
    if method := quantization.quantization_method(config):
        raise ModelError(
            f"{source} is quantized ({method}), and only full-precision weights can be written.\n"
            "  Give the full-precision model that it was quantized from."
        )


def where_weights_rest(module: Any) -> str:
    """Return where weights are offloaded to: `cpu`, `disk`, `cpu and disk`, or an empty text."""
    places = {str(place) for place in (getattr(module, "hf_device_map", None) or {}).values()}
    away = ("disk",) if places <= {"cpu", "disk"} else ("cpu", "disk")
    return " and ".join(place for place in away if place in places)


def _quiet() -> None:
    """Let libraries log errors only, and no progress: the caller shows that."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)


def auto_class(config: Any) -> Any:
    """Return the transformers class that loads a model.

    Models that also see pictures are loaded whole; their text tower is what is edited.
    """
    import transformers

    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _placement(settings: ModelSettings) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if settings.attention:
        options["attn_implementation"] = settings.attention
    if device_for(settings) == "auto":
        options["device_map"] = "auto"
        if settings.max_memory:
            options["max_memory"] = {
                int(k) if k.isdigit() else k: v for k, v in settings.max_memory.items()
            }
    return options


def _quantizing(config: Any, settings: ModelSettings) -> dict[str, Any]:
    """Return the options of quantization; weights are quantized on the device that they stay on."""
    options: dict[str, Any] = {}
    if settings.quantization:
        dtype = quantization.compute_dtype(config, settings.dtype)
        options["quantization_config"] = quantization.quantization_config(
            settings.quantization, dtype
        )
    if (options or quantization.quantization_method(config)) and device_for(settings) != "auto":
        options["device_map"] = {"": device_for(settings)}
    return options


def loading_advice(source: str, settings: ModelSettings, error: Exception) -> str:
    """Return what a loading error means for the recipe, and what to do about it."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{source} comes with its own code, which is not run unless you allow it.\n"
            "  Read that code, then set model.trust_remote_code = true."
        )
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{source} needs permission on the Hugging Face Hub.\n"
            "  Accept its terms on its page, then log in with:  hf auth login"
        )
    if "does not recognize this architecture" in text or isinstance(error, KeyError):
        return (
            f"{source}: this version of transformers does not know its model type.\n"
            f"  {text.splitlines()[0]}\n  Upgrade transformers, or choose another model."
        )
    if "dispatched on the CPU or the disk" in text:
        return (
            f"{source} does not fit on the GPU, and quantized weights can't rest elsewhere.\n"
            "  Raise model.max_memory or model.gpus_per_replica, or leave out model.quantization."
        )
    if "safetensors" in text:
        return f"{source} has no safetensors weights, and pickled ones are not read.\n  {text}"
    where = "" if settings.revision is None else f" at revision {settings.revision!r}"
    return (
        f"{source}{where} cannot be loaded.\n  {text.splitlines()[0] if text else error!r}\n"
        "  Check model.name: a folder with config.json, a Hub name such as "
        "Qwen/Qwen3-4B-Instruct-2507, or demo."
    )
