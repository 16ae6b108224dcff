"""Memory and time of a merged export, on a synthetic checkpoint as large as you like.

    python -m benchmarks.export_memory [--layers 16] [--hidden 4096] [--folder /a/disk/with/room]

A Llama of random bfloat16 weights is written one tensor at a time, and exported in a process of its
own, once for each norm mode. Counted is what that process holds (resident set size, sampled every
5 ms, and the kernel's own peak) beyond what it held when it was about to write, which is Python and
its libraries. Needs about twice the checkpoint's size on the disk.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness.record import save

VOCAB = 32_000
SHARD_BYTES = 2 * 10**9
NORMS = ("none", "row", "column")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--shard-size", default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "model"
        make_checkpoint(source, options.layers, options.hidden, options.intermediate)
        rows = []
        for norm in options.norms:
            rows.append(in_a_process(source, Path(folder) / "out", norm, options.shard_size))
            shutil.rmtree(Path(folder) / "out")
            print(rows[-1], flush=True)
    print(save("export", {"layers": options.layers, "hidden": options.hidden, "rows": rows}))


def in_a_process(source: Path, to: Path, norm: str, shard_size: str | None) -> dict[str, Any]:
    """What `measure` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.export_memory", "--child"]
    command += [str(source), str(to), norm, shard_size or "original"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# The checkpoint


def make_checkpoint(
    folder: Path, layers: int, hidden: int, intermediate: int, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a Llama of random weights, one tensor at a time, and give its bytes."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=VOCAB,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _tensors(layers, hidden, intermediate):
        size = 2 * torch.Size(shape).numel()
        if filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    noise = (torch.randn(hidden * max(intermediate, VOCAB)) / hidden**0.5).bfloat16()
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, tensors, noise)
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _tensors(layers: int, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden // 4, hidden),
            ("self_attn.v_proj", hidden // 4, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}.{name}.weight", (rows, columns)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCAB, hidden)


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: torch.Tensor) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            values = noise[: torch.Size(shape).numel()]
            file.write(values.view(torch.uint8).numpy().data)


# The measurement


def measure(source: str, to: str, norm: str, shard_size: str) -> dict[str, Any]:
    """Export in this process, and say what it took."""
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.export.checkpoint import Checkpoint
    from ray_abliterate.export.checkpoint_writers import stored_writers
    from ray_abliterate.export.file_layout import layout_of, parse_size
    from ray_abliterate.export.merged import EditedTensors, write_merged
    from ray_abliterate.export.scratch import Scratch
    from ray_abliterate.model.skeleton import build_skeleton
    from ray_abliterate.pipeline.progress import Unwatched
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.plan import ModelShape, Plan

    module = build_skeleton(Path(source), ModelSettings(name=source))
    checkpoint = Checkpoint.open(Path(source))
    targets = stored_writers(module, checkpoint, (), torch.device("cpu"))
    layers, hidden = module.config.num_hidden_layers, module.config.hidden_size
    vectors = torch.nn.functional.normalize(torch.randn(layers, hidden), dim=-1)
    plan = Plan.uniform(ModelShape(layers, hidden, ("attn", "mlp")), 1.5, norm)  # type: ignore[arg-type]
    edited = EditedTensors(targets, plan, Directions(vectors, "random", {}))
    layout = layout_of(checkpoint, None if shard_size == "original" else parse_size(shard_size))
    torch.ones(64, 64) @ torch.ones(64, 64)  # the first product allocates the library's buffers
    folder = Path(to)
    folder.mkdir()
    with Peak() as peak:
        started = time.perf_counter()
        write_merged(checkpoint, layout, edited, Scratch(folder, {}), Unwatched())
        seconds = time.perf_counter() - started
    largest = max(target.shape[1] * target.shape[2] for target in targets)
    return {
        "norm": norm,
        "bytes": layout.bytes,
        "files": len(layout.files),
        "seconds": round(seconds, 2),
        "resident_before_bytes": peak.before,
        "resident_peak_bytes": peak.highest,
        "added_bytes": peak.highest - peak.before,
        "largest_writer_float32_bytes": 4 * largest,
        "added_in_float32_writers": round((peak.highest - peak.before) / (4 * largest), 2),
    }


class Peak:
    """The most memory that this process holds inside a block."""

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self.before = self.highest = self._process.memory_info().rss
        self._kernel_before = _kernel_peak()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if (kernel := _kernel_peak()) > self._kernel_before:
            self.highest = max(self.highest, kernel)


def _kernel_peak() -> int:
    """The most that this process ever held, in bytes (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
