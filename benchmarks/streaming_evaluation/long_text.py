"""A long text in each carried context of constant memory: rate, memory, and a plain loop's rate.

Memory is the resident set without what is mapped from files.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.memory import anonymous_bytes
from benchmarks.streaming_evaluation.small_models import VOCAB, small_model

EVERY = 100_000
"""Tokens between two samples of the memory; a tenth of shorter texts."""
WINDOW, CHUNK, OVERLAP = 256, 1024, 256
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("llama", {"carry": "window", "window": WINDOW, "chunk_size": CHUNK}),
    "state": ("mamba2", {"carry": "state", "chunk_size": CHUNK}),
    "none": ("llama", {"carry": "none", "chunk_size": CHUNK, "overlap": OVERLAP}),
}
"""Model and settings by carried context."""


def write_tokens(path: Path, count: int) -> Path:
    """Write drawn token ids as a .npy file and return its path."""
    import numpy

    random = numpy.random.default_rng(0)
    numpy.save(path, random.integers(0, VOCAB, count, dtype=numpy.uint16))
    return path


def measure(carry: str, file: str, rounds: int) -> dict[str, Any]:
    """Return rate and memory of a whole file, and the rate of a plain loop over its beginning.

    Args:
        carry: A carried context of `SETTINGS`.
        file: Token ids as a .npy file.
        rounds: Rounds in which the beginning is read in turns, by us and by the plain loop.
    """
    import numpy
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator, open_source

    torch.set_num_threads(1)
    family, settings = SETTINGS[carry]
    module = small_model(family)
    count = int(numpy.load(file, mmap_mode="r").shape[0])
    evaluator = StreamingEvaluator(module, **settings)
    memory: list[tuple[int, int]] = []  # position and bytes
    every = min(EVERY, count // 10)

    def sample(progress: Any) -> None:
        if progress.position // every > (memory[-1][0] // every if memory else 0):
            memory.append((progress.position, anonymous_bytes()))

    totals = evaluator.evaluate(open_source(file), on_progress=sample)
    compared = min(count, 20 * CHUNK)
    short = StreamingEvaluator(module, **settings, max_tokens=compared)
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(_rate(lambda: short.evaluate(open_source(file)).loss, compared))
        plain.append(_rate(lambda: PLAIN_LOOPS[carry](module, file, compared), compared))
    return {
        "carry": carry,
        "family": family,
        "parameters": module.num_parameters(),
        "settings": settings,
        "tokens": count,
        "loss": totals.loss,
        "tokens_per_second": totals.tokens_per_second,
        "carried_bytes": totals.carried_bytes,
        "memory": memory,
        "slope_bytes_per_100k": slope(memory) * EVERY,
        "ours_tokens_per_second": [rate for rate, _ in ours],
        "plain_tokens_per_second": [rate for rate, _ in plain],
        "losses": [ours[0][1], plain[0][1]],
    }


def slope(memory: Sequence[tuple[int, int]]) -> float:
    """Return bytes per token, by least squares over all samples but the first."""
    rest = memory[1:]
    return float(statistics.linear_regression(*zip(*rest, strict=True)).slope) if rest[1:] else 0.0


def _rate(read: Callable[[], float], tokens: int) -> tuple[float, float]:
    """Return tokens per second, and the loss that reading gives."""
    started = time.perf_counter()
    loss = read()
    return tokens / (time.perf_counter() - started), loss


def strided_loss(module: Any, file: str, count: int, size: int, overlap: int) -> float:
    """Return the mean loss of overlapping passes with all their logits, as model pages show it."""
    import numpy
    import torch

    ids = torch.from_numpy(numpy.load(file)[:count].astype(numpy.int64))
    nats, done = 0.0, 1
    for first in range(0, count - overlap, size - overlap):
        part = ids[first : first + size]
        labels = part.clone()
        labels[: max(0, done - first)] = -100  # counted by an earlier pass
        with torch.no_grad():
            loss = module(input_ids=part[None], labels=labels[None], use_cache=False).loss
        counted = first + len(part) - done
        nats, done = nats + float(loss) * counted, first + len(part)
    return nats / (done - 1)


def recurrent_loss(module: Any, file: str, count: int) -> float:
    """Return the mean loss of passes that hand on the recurrent state, with all their logits."""
    import numpy
    import torch

    ids = torch.from_numpy(numpy.load(file)[:count].astype(numpy.int64))
    nats, cache = 0.0, None
    for first in range(0, count - 1, CHUNK):
        stop = min(first + CHUNK, count - 1)
        with torch.no_grad():
            out = module(input_ids=ids[None, first:stop], cache_params=cache, use_cache=True)
        cache = out.cache_params
        targets = ids[first + 1 : stop + 1]
        nats += float(torch.nn.functional.cross_entropy(out.logits[0], targets, reduction="sum"))
    return nats / (count - 1)


PLAIN_LOOPS: dict[str, Callable[[Any, str, int], float]] = {
    "window": lambda m, file, count: strided_loss(m, file, count, 2 * WINDOW, WINDOW),
    "none": lambda m, file, count: strided_loss(m, file, count, CHUNK, OVERLAP),
    "state": recurrent_loss,
}
