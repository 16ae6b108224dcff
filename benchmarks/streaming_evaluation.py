"""Streaming evaluation: a million tokens, what each carry computes, and what logits take.

    python -m benchmarks.streaming_evaluation [--tokens 1000000] [--rounds 3] [--save NAME]

Small models of real architectures with random weights; each length in a process of its own, from a
token file on disk. Memory is the resident set without what is mapped from files.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save

EVERY = 100_000
"""Tokens between two looks at the memory; a tenth of shorter texts."""
WINDOW, CHUNK, OVERLAP = 256, 1024, 256
VOCAB = 4096
LENGTHS = {
    "window": ("llama", {"carry": "window", "window": WINDOW, "chunk_size": CHUNK}),
    "state": ("mamba2", {"carry": "state", "chunk_size": CHUNK}),
    "none": ("llama", {"carry": "none", "chunk_size": CHUNK, "overlap": OVERLAP}),
}
FAMILIES = (
    "llama qwen3 qwen3_moe gemma2 gemma3_text mistral gpt2 gpt_oss opt mamba mamba2 falcon_mamba "
    "falcon_h1 bamba jamba zamba2 qwen3_next granitemoehybrid nemotron_h lfm2 recurrent_gemma xlstm"
).split()
BLOCKS, STATES_TOKENS = 16, 16_384
PLANS = 2000
"""Plans that are drawn to see where edits begin."""
VOCABULARIES = (49_152, 256_000)
LOGITS_TOKENS = 1024


def main() -> None:
    """Measure, print, save; or, in a process of its own, one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", default="")
    parser.add_argument("--part", type=json.loads, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part.pop("kind")](**options.part)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_tokens(Path(folder) / "tokens.npy", options.tokens))
        lengths = [
            apart("length", carry=carry, file=file, rounds=options.rounds) for carry in LENGTHS
        ]
    figures = {
        "threads": 1,
        "tokens": options.tokens,
        "lengths": lengths,
        "exactness": apart("exactness")["rows"],
        "logits": [
            {"vocab": vocab, "tokens": LOGITS_TOKENS}
            | {way: apart("logits", vocab=vocab, way=way)["bytes"] for way in ("plain", "sliced")}
            for vocab in VOCABULARIES
        ],
        "states": apart("states", tokens=min(options.tokens, STATES_TOKENS), rounds=options.rounds)[
            "rows"
        ],
        "first_edited": first_edited(),
    }
    print(save("streaming", figures, options.save))
    for row in [*lengths, *figures["exactness"], *figures["logits"], *figures["states"]]:
        print({name: value for name, value in row.items() if name != "memory"})


def write_tokens(path: Path, count: int) -> Path:
    """Drawn token ids as a .npy file."""
    import numpy

    draw = numpy.random.default_rng(0)
    numpy.save(path, draw.integers(0, VOCAB, count, dtype=numpy.uint16))
    return path


def apart(kind: str, **settings: Any) -> dict[str, Any]:
    """One part, in a process of its own."""
    part = json.dumps({"kind": kind, **settings})
    command = [sys.executable, "-m", "benchmarks.streaming_evaluation", "--part", part]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def small(family: str, vocab: int = VOCAB, layers: int = 2, **overrides: Any) -> Any:
    """A small model of a family, random and in float32."""
    from transformers import logging

    from ray_abliterate.testing.tiny import tiny_model

    logging.set_verbosity_error()
    sizes = {"hidden_size": 128, "vocab_size": vocab}
    if family == "mamba2":
        own: dict[str, Any] = {"num_heads": 8, "head_dim": 32, "chunk_size": 64, "state_size": 16}
    else:
        own = {"intermediate_size": 384, "head_dim": 32, "max_position_embeddings": 8192}
        own["attn_implementation"] = "sdpa"
    return tiny_model(family, layers=layers, **{**sizes, **own, **overrides})


# A long text


def length(carry: str, file: str, rounds: int) -> dict[str, Any]:
    """The whole file in one carry: rate, memory by length, and a plain loop beside it."""
    import numpy
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator, open_source

    torch.set_num_threads(1)
    family, settings = LENGTHS[carry]
    module = small(family)
    count = int(numpy.load(file, mmap_mode="r").shape[0])
    evaluator = StreamingEvaluator(module, **settings)
    memory: list[tuple[int, int]] = []
    every = min(EVERY, count // 10)

    def look(progress: Any) -> None:
        if progress.position // every > (memory[-1][0] // every if memory else 0):
            memory.append((progress.position, anonymous_bytes()))

    totals = evaluator.evaluate(open_source(file), on_progress=look)
    compared = min(count, 20 * CHUNK)
    short = StreamingEvaluator(module, **settings, max_tokens=compared)
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(rate(lambda: short.evaluate(open_source(file)).loss, compared))
        plain.append(rate(lambda: PLAIN[carry](module, file, compared), compared))
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
        "ours_tokens_per_second": [found[0] for found in ours],
        "plain_tokens_per_second": [found[0] for found in plain],
        "losses": [ours[0][1], plain[0][1]],
    }


def anonymous_bytes() -> int:
    """Resident memory that is not mapped from files."""
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def slope(memory: Sequence[tuple[int, int]]) -> float:
    """Bytes per token, by least squares over all but the first look."""
    rest = memory[1:]
    return float(statistics.linear_regression(*zip(*rest, strict=True)).slope) if rest[1:] else 0.0


def rate(work: Callable[[], float], tokens: int) -> tuple[float, float]:
    """Tokens per second, and what the work gives."""
    started = time.perf_counter()
    found = work()
    return tokens / (time.perf_counter() - started), found


def plain_strides(module: Any, file: str, count: int, size: int, overlap: int) -> float:
    """Overlapping passes with all their logits, as model pages show it; mean loss."""
    import numpy
    import torch

    ids = torch.from_numpy(numpy.load(file)[:count].astype(numpy.int64))
    nats, done = 0.0, 1
    for first in range(0, count - overlap, size - overlap):
        part = ids[first : first + size]
        labels = part.clone()
        labels[: max(0, done - first)] = -100
        with torch.no_grad():
            loss = module(input_ids=part[None], labels=labels[None], use_cache=False).loss
        own = first + len(part) - done
        nats, done = nats + float(loss) * own, first + len(part)
    return nats / (done - 1)


def plain_state(module: Any, file: str, count: int) -> float:
    """Passes that hand on the state, with all their logits; mean loss."""
    import numpy
    import torch

    ids = torch.from_numpy(numpy.load(file)[:count].astype(numpy.int64))
    nats, cache = 0.0, None
    for first in range(0, count - 1, CHUNK):
        stop = min(first + CHUNK, count - 1)
        with torch.no_grad():
            out = module(input_ids=ids[None, first:stop], cache_params=cache, use_cache=True)
        cache = out.cache_params
        wanted = ids[first + 1 : stop + 1]
        nats += float(torch.nn.functional.cross_entropy(out.logits[0], wanted, reduction="sum"))
    return nats / (count - 1)


PLAIN: dict[str, Callable[[Any, str, int], float]] = {
    "window": lambda m, file, count: plain_strides(m, file, count, 2 * WINDOW, WINDOW),
    "none": lambda m, file, count: plain_strides(m, file, count, CHUNK, OVERLAP),
    "state": plain_state,
}


# What each carry computes


def exactness() -> dict[str, Any]:
    """Largest difference of a token's loss from the reference, by family and carry."""
    import torch

    torch.set_num_threads(1)
    return {"rows": [exactness_of(family) for family in FAMILIES]}


def exactness_of(family: str) -> dict[str, Any]:
    """One family."""
    import torch
    from transformers import logging

    from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
    from ray_abliterate.testing.tiny import tiny_model

    logging.set_verbosity_error()
    module = tiny_model(family, max_position_embeddings=512)
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    findings = StreamingEvaluator(module).findings
    row: dict[str, Any] = {"family": family, "notes": list(findings.notes)}
    for carry in CarriedContext:
        if carry not in findings.per_pass:
            row[carry.value] = {"refused": findings.refused[carry]}
            continue
        text = ids[:120] if carry is CarriedContext.WINDOW else ids
        wanted = reference(module, text, carry)
        losses = token_losses(module, text, carry, 64)
        single = findings.per_pass[carry] == 1
        row[carry.value] = {"difference": float((losses - wanted).abs().max()), "single": single}
    return row


def reference(module: Any, ids: Any, carry: str) -> Any:
    """Losses of one full pass; of one whose mask is made by hand; of passes of their own."""
    import torch

    if carry == "window":
        return masked_losses(module, ids, 16)
    parts = [(0, len(ids), 1)]
    if carry == "none":
        parts = [(i, min(i + 64, len(ids)), 16 if i else 1) for i in range(0, len(ids) - 16, 48)]
    found = []
    for first, stop, own in parts:
        with torch.inference_mode():
            logits = module(input_ids=ids[None, first:stop], use_cache=False).logits[0]
        wanted = ids[first + 1 : stop]
        losses = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")
        found.append(losses[own - 1 :])
    return torch.cat(found)


def masked_losses(module: Any, ids: Any, window: int) -> Any:
    """Losses of one full pass in which each token sees so many, by hand-made masks."""
    import torch

    place = torch.arange(len(ids))
    away = place[:, None] - place[None]

    def band(reach: int) -> Any:
        mask = torch.zeros(away.shape)
        mask[(away < 0) | (away >= reach)] = torch.finfo(torch.float32).min
        return mask[None, None]

    own = min(getattr(module.config, "sliding_window", None) or window, window)
    masks = {"full_attention": band(window), "sliding_attention": band(own)}
    masks |= dict.fromkeys(("linear_attention", "conv"))
    given = {"input_ids": ids[None], "position_ids": place[None], "use_cache": False}
    with torch.inference_mode():
        try:
            logits = module(attention_mask=masks, **given).logits[0]
        except (
            AttributeError,
            TypeError,
            KeyError,
            ValueError,
            RuntimeError,
        ):  # models with one kind of layer take one mask
            logits = module(attention_mask=band(own), **given).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def token_losses(module: Any, ids: Any, carry: str, size: int) -> Any:
    """The loss of every token but the first."""
    import pyarrow
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator

    own = {"window": {"window": 16}, "none": {"overlap": 16}}.get(carry, {})
    evaluator = StreamingEvaluator(module, carry=carry, chunk_size=size, **own)
    with tempfile.TemporaryDirectory() as folder:
        evaluator.evaluate(ids, token_losses=Path(folder) / "losses.arrow")
        with pyarrow.OSFile(str(Path(folder) / "losses.arrow")) as file:
            table = pyarrow.ipc.open_stream(file).read_all()
    return torch.from_numpy(table["loss"].to_numpy().copy())


# What is kept of the base model


def states(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds for a text without states, with their recording, and from a block on; by block, the
    fastest of some rounds."""
    import torch

    torch.set_num_threads(1)
    module = small("llama", layers=BLOCKS, hidden_size=256, intermediate_size=768)
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    rows = []
    for block in (BLOCKS // 4, BLOCKS // 2, 3 * BLOCKS // 4):
        found = [reading(module, ids, block) for _ in range(rounds)]
        row = {"block": block, "blocks": BLOCKS, "tokens": tokens, "bytes": found[0]["bytes"]}
        seconds = {way: min(own[way] for own in found) for way in ("plain", "recording", "from")}
        rows.append(row | seconds | {"same_bits": all(own["same_bits"] for own in found)})
    return {"rows": rows}


def reading(module: Any, ids: Any, block: int) -> dict[str, Any]:
    """Seconds of each way, one after the other."""
    from ray_abliterate.evaluation.streaming import HiddenStateCache, StreamingEvaluator

    settings: dict[str, Any] = {"carry": "window", "window": WINDOW, "chunk_size": CHUNK}
    with tempfile.TemporaryDirectory() as folder:
        files = HiddenStateCache(Path(folder))
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "recording": {"states": files, "states_at": (block,)},
            "from": {"states": files},
        }
        seconds, nats = {}, set()
        for name, own in ways.items():
            evaluator = StreamingEvaluator(module, **own, **settings)
            started = time.perf_counter()
            nats.add(evaluator.evaluate(ids).nats)
            seconds[name] = time.perf_counter() - started
        return {**seconds, "bytes": files.bytes, "same_bits": len(nats) == 1}


def first_edited() -> dict[str, Any]:
    """The first edited block of plans that are drawn from the default search space."""
    from benchmarks.versus_heretic import shared_plans as points
    from ray_abliterate.search.plan import ModelShape

    shape = ModelShape(30, 576, ("attn", "mlp"))
    found = []
    for plan in points.draw(shape, "row", PLANS, seed=0):
        strengths = [plan.strengths(component, shape.layers) for component in shape.components]
        edited = [n for n in range(shape.layers) if any(own[n] for own in strengths)]
        found.append(edited[0] if edited else shape.layers)
    return {
        "blocks": shape.layers,
        "plans": PLANS,
        "mean": statistics.mean(found),
        "quartiles": statistics.quantiles(found, n=4),
    }


# What logits take


def logits(vocab: int, way: str) -> dict[str, Any]:
    """Peak memory that one chunk adds, with all its logits at once or with slices of them."""
    import torch

    from ray_abliterate.evaluation.streaming import StreamingEvaluator

    torch.set_num_threads(1)
    module = small("llama", vocab)
    ids = torch.randint(0, vocab, (LOGITS_TOKENS + 1,))
    evaluator = StreamingEvaluator(module, carry="kv", chunk_size=LOGITS_TOKENS + 1)
    before = peak_bytes()
    if way == "sliced":
        evaluator.evaluate(ids)
    else:
        with torch.inference_mode():
            module(input_ids=ids[None], labels=ids[None], use_cache=False)
    return {"bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """The largest resident set until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "length": length,
    "exactness": exactness,
    "logits": logits,
    "states": states,
}


if __name__ == "__main__":
    main()
