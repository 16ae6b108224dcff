"""What a replica reports about its model: shape, sizes, fingerprint, how it computes, notes."""

import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.model.fingerprint import weights_fingerprint
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.loading import where_weights_rest
from ray_abliterate.model.quantization import bytes_of, describe_quantization
from ray_abliterate.replica.messages import ModelFacts
from ray_abliterate.search.plan import ModelShape


def describe_model(
    model: LanguageModel,
    cache: WeightCache,
    shape: ModelShape,
    writers: int,
    attention: str | None,
    extent: tuple[int, int],
) -> ModelFacts:
    """Collect the facts about a loaded model.

    Args:
        model: The model, as it was loaded.
        cache: Its writers' pristine weights.
        shape: Its shape.
        writers: Number of its writers.
        attention: The attention that the recipe asks for.
        extent: Tokens of the longest prompt, and of the longest answer.
    """
    most, why = most_plans_per_pass(model, cache, extent)
    return ModelFacts(
        shape=shape,
        writers=writers,
        parameters=model.module.num_parameters(),
        model_bytes=sum(map(bytes_of, model.module.parameters())),
        cache_bytes=cache.bytes,
        dtype=str(model.module.dtype).removeprefix("torch."),
        device=_device_name(model.device),
        quantization=describe_quantization(model.module),
        offloaded=where_weights_rest(model.module),
        model_type=model.module.config.model_type,
        revision=getattr(model.module.config, "_commit_hash", None),
        fingerprint=weights_fingerprint(model.module),
        template=model.chat.fingerprint,
        computes=_computes(model, attention),
        most_per_pass=most,
        why_not_more=why,
        notes=tuple(_notes(model)),
    )


def most_plans_per_pass(
    model: LanguageModel, cache: WeightCache, extent: tuple[int, int]
) -> tuple[int, str]:
    """Return how many plans can share a pass, and why not more.

    Args:
        model: The model, as it was loaded.
        cache: Its writers' pristine weights.
        extent: Tokens of the longest prompt, and of the longest answer.
    """
    if model.not_packable:
        return 1, f"the engine does not serve this model ({model.not_packable})"
    if cache.stacked_experts:
        return 1, f"{cache.stacked_experts} stacks experts, and is no linear layer"
    free = model.free_bytes
    most = model.memory_cost.rows(free, *extent, 1)
    return max(most, 1), f"{free / 1e9:.1f} GB are free for their keys and values"


def _computes(model: LanguageModel, attention: str | None) -> str:
    """Return the choices that decide rounding. Content keys hold this text: never reword it."""
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    away = where_weights_rest(model.module)
    choices = [
        where,
        attention or "attention by default",
        "plain path" if model.not_packable else "engine",
        "one length a batch" if not model.padded.pads_safely else "padded",
        "linear layers in float32" if model.float32_linears is not None else "own dtype",
        *filter(None, (describe_quantization(model.module), away and f"weights rest in {away}")),
    ]
    return ", ".join(choices)


def _notes(model: LanguageModel) -> list[str]:
    """Return what a user should know."""
    notes = []
    if not model.padded.pads_safely:
        notes.append("padding changes this model's output: batches hold prompts of one length")
    if model.not_packable:
        notes.append(f"the plain path is used, not the engine: {model.not_packable}")
    if model.float32_linears is not None:
        notes.append("this CPU is faster in float32: linear layers compute in it, and round")
    if away := where_weights_rest(model.module):
        notes.append(
            f"the model does not fit: weights rest in {away} and are fetched for every pass, which "
            "is slow"
        )
    if quantized := describe_quantization(model.module):
        notes.append(
            f"weights are quantized ({quantized}); exports are full-precision, and are scored "
            "again as such"
        )
    return notes


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"
