"""Tells one model's weights from another's by a hash of a sample of every parameter."""

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from ray_abliterate.model.quantization import plain_tensors

SPREAD_VALUES = 256
"""Values of each tensor that a `run` fingerprint looks at, spread evenly over it."""
LEADING_VALUES = 16
"""Values of each tensor that a `state` fingerprint looks at: the first ones, in float32."""


def weights_fingerprint(model: Any, kind: Literal["run", "state"] = "run") -> str:
    """Return a SHA-256 of every tensor's name and shape, and of some of its values.

    There are two kinds because both stand in files that must stay readable.

    Args:
        model: A module; of anything without `named_parameters` nothing is looked at.
        kind: `run` stands in run directories: dtypes and buffers count, values are spread over
            each tensor, and the whole hash is returned. `state` stands in saved states of
            evaluations: parameters only, their first values, and 16 digits of the hash.
    """
    digest = hashlib.sha256()
    if kind == "run":
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            for part in _stored_parts(tensor):
                digest.update(_spread(part).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    for name, tensor in model.named_parameters() if hasattr(model, "named_parameters") else ():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        for part in _stored_parts(tensor):
            digest.update(part.flatten()[:LEADING_VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a quantized one consists of, but for those without values."""
    return [part for part in plain_tensors(tensor.detach()) if not part.is_meta]


def _spread(part: Tensor) -> Tensor:
    """Return about `SPREAD_VALUES` values of a tensor, on the CPU."""
    flat = part.reshape(-1)
    # an odd step, since one that divides the row length would look at a single column
    return flat[:: -(-flat.numel() // SPREAD_VALUES) | 1].contiguous().cpu()
