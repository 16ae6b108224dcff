"""Memory and time of a merged export, on a synthetic checkpoint of any size.

    python -m benchmarks.export_memory [--layers 16] [--hidden 4096] [--folder /a/disk/with/room]

A Llama of random bfloat16 weights is written one tensor at a time, and exported in a process of its
own, once for each norm mode. Counted is what that process holds (resident set size, sampled every
5 ms, and the kernel's own peak) beyond what it held when it was about to write, which is Python and
its libraries. It needs about twice the checkpoint's size on the disk.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.memory import PeakMemory, peak_bytes, resident_bytes
from benchmarks.harness.tables import column_table, gigabytes
from benchmarks.harness.worker_process import call_in_new_process

if TYPE_CHECKING:
    import torch

VOCAB = 32_000
SHARD_BYTES = 2 * 10**9
NORMS = ("none", "row", "column")


def main() -> None:
    """Export the checkpoint once per norm mode, print, save."""
    parser = CLAIM.parser(layers=2, hidden=512, intermediate=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--shard-size", default=None, help="such as 2GB; as the original if unset")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on a disk with room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "model"
        make_checkpoint(source, options.layers, options.hidden, options.intermediate)
        rows = []
        for norm in options.norms:
            rows.append(
                export_in_new_process(source, Path(folder) / "out", norm, options.shard_size)
            )
            shutil.rmtree(Path(folder) / "out")
            print(rows[-1], flush=True)
    CLAIM.save({"layers": options.layers, "hidden": options.hidden, "rows": rows}, options)


def export_in_new_process(
    source: Path, to: Path, norm: str, shard_size: str | None
) -> dict[str, Any]:
    """Return what `measure` returns in a process that has done nothing else.

    Args:
        source: The checkpoint's folder.
        to: The folder to write, which must not exist.
        norm: Norm mode of the edit.
        shard_size: Largest size of a file, such as `50MB`; the original's files if None.
    """
    return call_in_new_process(measure, str(source), str(to), norm, shard_size or "original")


# The checkpoint


def make_checkpoint(
    folder: Path, layers: int, hidden: int, intermediate: int, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a Llama of random weights, one tensor at a time, and return its bytes."""
    import torch
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
        size = 2 * math.prod(shape)
        if filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    noise = (torch.randn(hidden * max(intermediate, VOCAB)) / hidden**0.5).bfloat16()
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, tensors, noise)
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _tensors(layers: int, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every tensor, in the order of the files."""
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


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: "torch.Tensor") -> None:
    """Write a safetensors file whose tensors all are beginnings of `noise`."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            values = noise[: math.prod(shape)]
            file.write(values.view(torch.uint8).numpy().data)


# The measurement


def measure(source: str, to: str, norm: str, shard_size: str) -> dict[str, Any]:
    """Export in this process, and return the bytes and seconds that it took."""
    import torch

    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.export.checkpoint import Checkpoint
    from ray_abliterate.export.checkpoint_writers import stored_writers
    from ray_abliterate.export.file_layout import choose_layout, parse_size
    from ray_abliterate.export.merged import EditedTensors, write_merged
    from ray_abliterate.export.output_folder import PartialExport
    from ray_abliterate.model.skeleton import skeleton_of_folder
    from ray_abliterate.pipeline.progress import SilentProgress
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.plan import ModelShape, Plan

    module = skeleton_of_folder(Path(source), ModelSettings(name=source))
    checkpoint = Checkpoint.open(Path(source))
    targets = stored_writers(module, checkpoint, (), torch.device("cpu"))
    layers, hidden = module.config.num_hidden_layers, module.config.hidden_size
    vectors = torch.nn.functional.normalize(torch.randn(layers, hidden), dim=-1)
    plan = Plan.uniform(ModelShape(layers, hidden, ("attn", "mlp")), 1.5, norm)  # type: ignore[arg-type]
    edited = EditedTensors(targets, plan, Directions(vectors, "random", {}))
    layout = choose_layout(checkpoint, None if shard_size == "original" else parse_size(shard_size))
    torch.ones(64, 64) @ torch.ones(64, 64)  # the first product allocates the library's buffers
    folder = Path(to)
    folder.mkdir()
    kernel_before = peak_bytes()
    with PeakMemory(resident_bytes, interval_seconds=0.005) as memory:
        started = time.perf_counter()
        write_merged(checkpoint, layout, edited, PartialExport(folder, {}), SilentProgress())
        seconds = time.perf_counter() - started
    peak = memory.highest
    if (kernel := peak_bytes()) > kernel_before:  # between two samples, too
        peak = max(peak, kernel)
    largest = max(target.shape[1] * target.shape[2] for target in targets)
    return {
        "norm": norm,
        "bytes": layout.bytes,
        "files": len(layout.files),
        "seconds": round(seconds, 2),
        "resident_before_bytes": memory.before,
        "resident_peak_bytes": peak,
        "added_bytes": peak - memory.before,
        "largest_writer_float32_bytes": 4 * largest,
        "added_in_float32_writers": round((peak - memory.before) / (4 * largest), 2),
    }


def export_table(figures: Figures) -> list[str]:
    """Return memory and time of a merged export, by norm mode."""
    columns = {
        "norm": lambda row: f"`{row['norm']}`",
        "written, GB": lambda row: gigabytes(row["bytes"]),
        "largest writer in float32, GB": lambda row: gigabytes(
            row["largest_writer_float32_bytes"], 3
        ),
        "added memory, GB": lambda row: gigabytes(row["added_bytes"], 3),
        "in such writers": lambda row: row["added_in_float32_writers"],
        "seconds": lambda row: f"{row['seconds']:.0f}",
    }
    return column_table(columns, figures["rows"])


CLAIM = Claim(
    "export_memory",
    "Memory and time of a merged export, on a synthetic checkpoint of any size.",
    "export",
    {"export": export_table},
)

if __name__ == "__main__":
    main()
