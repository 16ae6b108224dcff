"""Peak memory of one chunk, with all its logits at once and with slices of them."""

from benchmarks.harness.memory import peak_bytes
from benchmarks.streaming_evaluation.small_models import small_model

VOCABULARIES = (49_152, 256_000)
TOKENS = 1024
"""Predicted tokens of the chunk."""


def measure(vocab: int, way: str) -> dict[str, int]:
    """Return the bytes that one chunk adds to this process's peak.

    Args:
        vocab: Size of the vocabulary.
        way: `sliced`: streaming evaluation; `plain`: the model's own loss over all logits.
    """
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator

    torch.set_num_threads(1)
    module = small_model("llama", vocab)
    ids = torch.randint(0, vocab, (TOKENS + 1,))
    evaluator = StreamingEvaluator(module, carry="kv", chunk_size=TOKENS + 1)
    before = peak_bytes()
    if way == "sliced":
        evaluator.evaluate(ids)
    else:
        with torch.inference_mode():
            module(input_ids=ids[None], labels=ids[None], use_cache=False)
    return {"bytes": peak_bytes() - before}
