"""The state of a model's cache: its kinds of layers, its size, snapshots, and export to a file.

Knows the layers of transformers' `DynamicCache`; any other kind of cache is copied whole.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheLayers:
    """How many layers of each kind a cache has.

    Attributes:
        full: Layers that keep all keys and values.
        bounded: Layers that keep the keys and values of a window.
        recurrent: Layers that keep a state of fixed size.
        opaque: The cache is of an unknown kind, whose layers cannot be counted.
    """

    full: int = 0
    bounded: int = 0
    recurrent: int = 0
    opaque: bool = False

    @classmethod
    def of(cls, cache: Any) -> "CacheLayers":
        """Count the layers of a cache that has been used."""
        from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

        if not isinstance(cache, Cache):
            return cls(opaque=True)
        layers = cache.layers
        full = sum(layer_grows(layer) for layer in layers)
        bounded = sum(bool(getattr(layer, "sliding_window", None)) for layer in layers)
        recurrent = sum(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        return cls(full, bounded, recurrent)


def keeps_every_position(layer: Any) -> bool:
    """Return whether a layer, by its exact type, only ever appends keys and values."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def layer_grows(layer: Any) -> bool:
    """Return whether a layer's memory grows with the text."""
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer) and not getattr(layer, "sliding_window", None)


def cache_bytes(cache: Any) -> int:
    """Return the memory behind a cache; storage that tensors share counts once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)
    }
    return sum(storages.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, list | tuple):
        return [t for each in value for t in _tensors(each)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") and not callable(value) else []


def with_stand_in_layers(cache: Any, start: int) -> Any:
    """Prepare a cache for passes that begin at block `start`.

    A model may ask the layer of a block that is not run how many tokens it has seen; a layer of the
    same kind behind it answers in its place.
    """
    for number in range(min(start, len(cache.layers))):
        kind = _layer_kind(cache.layers[number])
        alike = (layer for layer in cache.layers[start:] if _layer_kind(layer) == kind)
        cache.layers[number] = next(alike, cache.layers[number])
    return cache


def _layer_kind(layer: Any) -> tuple[type, Any]:
    return type(layer), getattr(layer, "sliding_window", None)


# Snapshots


def snapshot_cache(cache: Any) -> Any:
    """Return what `restore_cache` needs to undo later passes; cheap for layers that grow."""
    if cache is None:
        return None
    from transformers.cache_utils import Cache

    if not isinstance(cache, Cache):
        return copy.deepcopy(cache)
    return [_layer_snapshot(layer) for layer in cache.layers]


def restore_cache(cache: Any, snapshot: Any) -> Any:
    """Return the cache as it was at the snapshot, which can be restored any number of times."""
    if snapshot is None:
        return None
    if not isinstance(snapshot, list):
        return copy.deepcopy(snapshot)
    del cache.layers[len(snapshot) :]
    for layer, (length, attributes) in zip(cache.layers, snapshot, strict=True):
        vars(layer).update(copy.deepcopy(attributes))
        if length is None:
            continue
        if length:
            # keys and values are (batch, head, token, width)
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        else:
            layer.keys = layer.values = None
            layer.is_initialized = False
    return cache


def _layer_snapshot(layer: Any) -> tuple[int | None, dict[str, Any]]:
    """Return the length of a layer that only grows, and copies of all else."""
    if not keeps_every_position(layer):
        return None, copy.deepcopy(vars(layer))
    others = {k: v for k, v in vars(layer).items() if k not in ("keys", "values")}
    in_use = isinstance(layer.keys, Tensor) and layer.keys.numel() > 0
    return int(layer.keys.shape[-2]) if in_use else 0, copy.deepcopy(others)


# Export to a file


def export_cache(cache: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """Return a cache's tensors by name, and all else in values that JSON can hold.

    None stands for a cache of an unknown kind.
    """
    if type(cache).__name__ != "DynamicCache":
        return None
    tensors: dict[str, Tensor] = {}
    rest = []
    for number, layer in enumerate(cache.layers):
        values: dict[str, Any] = {"kind": type(layer).__name__}
        for name, value in vars(layer).items():
            if not _export(f"{number}.{name}", value, values, tensors):
                return None
        rest.append(values)
    return tensors, rest


def _export(name: str, value: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Put one attribute among the tensors or the values; return whether that is possible."""
    attribute = name.partition(".")[2]
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
    elif isinstance(value, dict):
        return all(_export(f"{name}.{key}", each, values, tensors) for key, each in value.items())
    elif isinstance(value, torch.dtype | torch.device):
        values[attribute] = f"{type(value).__name__}:{value}".replace("torch.", "")
    elif value is None or isinstance(value, bool | int | float | str):
        values[attribute] = value
    else:
        return False
    return True


def import_cache(
    cache: Any, tensors: dict[str, Tensor], rest: list[dict[str, Any]], device: torch.device
) -> bool:
    """Fill a new cache with what `export_cache` gave; return whether it is of the same kind."""
    kinds = [type(layer).__name__ for layer in cache.layers]
    if kinds != [values["kind"] for values in rest]:
        return False
    for layer, values in zip(cache.layers, rest, strict=True):
        for name, value in values.items():
            if name != "kind":
                _set_attribute(layer, name, _parse(value, device))
    for name, tensor in tensors.items():
        number, _, attribute = name.partition(".")
        _set_attribute(cache.layers[int(number)], attribute, tensor.to(device))
    return True


def _set_attribute(layer: Any, name: str, value: Any) -> None:
    """Set `attribute`, or an item of one that is a dictionary (`attribute.key`)."""
    attribute, _, key = name.partition(".")
    if key:
        getattr(layer, attribute)[int(key)] = value
    else:
        setattr(layer, attribute, value)


def _parse(value: Any, device: torch.device) -> Any:
    """Undo how `_export` writes dtypes and devices; every device becomes the one at hand."""
    if isinstance(value, str) and value.startswith("dtype:"):
        return getattr(torch, value.removeprefix("dtype:"))
    return device if isinstance(value, str) and value.startswith("device:") else value
