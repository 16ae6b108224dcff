"""A text read from a block on, with hidden states of the base model that were stored before.

Beside that, at which block edits of drawn plans begin, since a text is read from there.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.streaming_evaluation.long_text import CHUNK, WINDOW
from benchmarks.streaming_evaluation.small_models import VOCAB, small_model

BLOCKS = 16
PLANS = 2000
"""Plans that are drawn to see where edits begin."""


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of a text without states, with their recording, and from a block on.

    Args:
        tokens: Length of the text.
        rounds: Rounds of which the fastest counts.
    """
    import torch

    torch.set_num_threads(1)
    module = small_model("llama", layers=BLOCKS, hidden_size=256, intermediate_size=768)
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    rows = []
    for block in (BLOCKS // 4, BLOCKS // 2, 3 * BLOCKS // 4):
        measured = [_read(module, ids, block) for _ in range(rounds)]
        row = {"block": block, "blocks": BLOCKS, "tokens": tokens, "bytes": measured[0]["bytes"]}
        fastest = {way: min(m[way] for m in measured) for way in ("plain", "recording", "from")}
        rows.append(row | fastest | {"same_bits": all(m["same_bits"] for m in measured)})
    return {"rows": rows}


def _read(module: Any, ids: Any, block: int) -> dict[str, Any]:
    """Return the seconds of each way, one after the other."""
    from ray_abliterate.evaluation.streaming import HiddenStateCache, StreamingEvaluator

    settings: dict[str, Any] = {"carry": "window", "window": WINDOW, "chunk_size": CHUNK}
    with tempfile.TemporaryDirectory() as folder:
        cache = HiddenStateCache(Path(folder))
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "recording": {"states": cache, "states_at": (block,)},
            "from": {"states": cache},
        }
        seconds, nats = {}, set()
        for name, way in ways.items():
            evaluator = StreamingEvaluator(module, **way, **settings)
            started = time.perf_counter()
            nats.add(evaluator.evaluate(ids).nats)
            seconds[name] = time.perf_counter() - started
        return {**seconds, "bytes": cache.bytes, "same_bits": len(nats) == 1}


def first_edited_blocks() -> dict[str, Any]:
    """Return where the edits of plans begin that are drawn from the default search space."""
    from benchmarks.versus_heretic.shared_plans import draw
    from ray_abliterate.search.plan import ModelShape

    shape = ModelShape(30, 576, ("attn", "mlp"))
    first_blocks = []
    for plan in draw(shape, "row", PLANS, seed=0):
        strengths = [plan.strengths(component, shape.layers) for component in shape.components]
        edited = [n for n in range(shape.layers) if any(by_layer[n] for by_layer in strengths)]
        first_blocks.append(edited[0] if edited else shape.layers)
    return {
        "blocks": shape.layers,
        "plans": PLANS,
        "mean": statistics.mean(first_blocks),
        "quartiles": statistics.quantiles(first_blocks, n=4),
    }
