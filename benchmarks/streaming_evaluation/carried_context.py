"""How far the losses of each carried context are from a reference computed in one full pass."""

import tempfile
from pathlib import Path
from typing import Any

FAMILIES = (
    "llama qwen3 qwen3_moe gemma2 gemma3_text mistral gpt2 gpt_oss opt mamba mamba2 falcon_mamba "
    "falcon_h1 bamba jamba zamba2 qwen3_next granitemoehybrid nemotron_h lfm2 recurrent_gemma xlstm"
).split()
TINY_WINDOW, TINY_CHUNK, TINY_OVERLAP = 16, 64, 16


def measure(families: list[str]) -> dict[str, Any]:
    """Return the largest difference of a token's loss from the reference, by family and context."""
    import torch

    torch.set_num_threads(1)
    return {"rows": [_measure_family(family) for family in families]}


def _measure_family(family: str) -> dict[str, Any]:
    import torch
    from transformers import logging

    from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
    from ray_abliterate.testing.tiny import tiny_model

    logging.set_verbosity_error()
    module = tiny_model(family, max_position_embeddings=512)
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    capabilities = StreamingEvaluator(module).capabilities
    row: dict[str, Any] = {"family": family, "notes": list(capabilities.notes)}
    for carry in CarriedContext:
        if carry not in capabilities.pass_limits:
            row[carry.value] = {"refused": capabilities.refused[carry]}
            continue
        text = ids[:120] if carry is CarriedContext.WINDOW else ids
        expected = reference_losses(module, text, carry)
        losses = streamed_losses(module, text, carry, TINY_CHUNK)
        single = capabilities.pass_limits[carry] == 1
        row[carry.value] = {"difference": float((losses - expected).abs().max()), "single": single}
    return row


def reference_losses(module: Any, ids: Any, carry: str) -> Any:
    """Return the losses of all tokens but the first, `"token"`, without streaming.

    Args:
        module: The model.
        ids: Token ids.
        carry: `window`: one pass whose mask is made by hand; `none`: chunks that overlap, each
            passed alone; else one pass over everything.
    """
    import torch

    if carry == "window":
        return _masked_losses(module, ids, TINY_WINDOW)
    parts = [(0, len(ids), 1)]  # first and last token, and the first one that counts
    if carry == "none":
        stride = TINY_CHUNK - TINY_OVERLAP
        parts = [
            (first, min(first + TINY_CHUNK, len(ids)), TINY_OVERLAP if first else 1)
            for first in range(0, len(ids) - TINY_OVERLAP, stride)
        ]
    losses = []
    for first, stop, counted in parts:
        with torch.inference_mode():
            logits = module(input_ids=ids[None, first:stop], use_cache=False).logits[0]
        targets = ids[first + 1 : stop]
        by_token = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")
        losses.append(by_token[counted - 1 :])
    return torch.cat(losses)


def _masked_losses(module: Any, ids: Any, window: int) -> Any:
    """Return the losses of one full pass in which each token sees `window` tokens."""
    import torch

    position = torch.arange(len(ids))
    distance = position[:, None] - position[None]  # (query, key)

    def band(reach: int) -> Any:
        mask = torch.zeros(distance.shape)
        mask[(distance < 0) | (distance >= reach)] = torch.finfo(torch.float32).min
        return mask[None, None]

    sliding = min(getattr(module.config, "sliding_window", None) or window, window)
    masks = {"full_attention": band(window), "sliding_attention": band(sliding)}
    masks |= dict.fromkeys(("linear_attention", "conv"))
    arguments = {"input_ids": ids[None], "position_ids": position[None], "use_cache": False}
    with torch.inference_mode():
        try:
            logits = module(attention_mask=masks, **arguments).logits[0]
        except (
            AttributeError,
            TypeError,
            KeyError,
            ValueError,
            RuntimeError,
        ):  # models with one kind of layer take one mask
            logits = module(attention_mask=band(sliding), **arguments).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def streamed_losses(module: Any, ids: Any, carry: str, size: int) -> Any:
    """Return the loss of every token but the first, `"token"`, by streaming evaluation."""
    import pyarrow
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator

    by_carry = {"window": {"window": TINY_WINDOW}, "none": {"overlap": TINY_OVERLAP}}
    settings: dict[str, Any] = by_carry.get(carry, {})
    evaluator = StreamingEvaluator(module, carry=carry, chunk_size=size, **settings)
    with tempfile.TemporaryDirectory() as folder:
        evaluator.evaluate(ids, token_losses=Path(folder) / "losses.arrow")
        with pyarrow.OSFile(str(Path(folder) / "losses.arrow")) as file:
            table = pyarrow.ipc.open_stream(file).read_all()
    return torch.from_numpy(table["loss"].to_numpy().copy())
