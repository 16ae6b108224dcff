"""The time of a decode step against the time to read the weights, by trials per pass.

    python -m benchmarks.decode_step [--shape llama-8b] [--rows 100] [--prompt 60] [--tokens 100]
        [--per-pass 1 2 4 8] [--dtype bfloat16]

The model has random weights, on a GPU if there is one. A step's time is the time by which longer
answers take longer, so that all it needs is in it: reading tokens back, Python, kernel launches. On
a GPU it is measured with CUDA graphs and without. The floor is the time to read the weights, and
the keys and values of all rows, once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
SHORT_TOKENS = 4
"""Tokens of the short answers, whose time is subtracted."""
ROUNDS = 3


def main() -> None:
    """Measure decode steps, print, save."""
    options = read_options()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = DecodeBench(options, device)
    rows = []
    for count in options.per_pass:
        rows.append({"per_pass": count, **bench.measure(count)})
        print(rows[-1], flush=True)
    figures = {
        "shape": options.shape,
        "dtype": options.dtype,
        "rows": options.rows,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "bytes_per_s": bench.bandwidth,
        "weight_bytes": bench.weight_bytes,
        "measured": rows,
    }
    CLAIM.save(figures, options, options.save)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = CLAIM.parser(rows=2, prompt=8, tokens=6, per_pass=[1, 2], dtype="float32")
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="smollm2-135m")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--rows", type=int, default=100, help="prompts of a trial")
    add("--prompt", type=int, default=60, help="tokens of a prompt")
    add("--tokens", type=int, default=100, help="tokens of an answer")
    add("--per-pass", type=int, nargs="+", default=[1, 2, 4, 8], help="trials that share a pass")
    add("--save", default="decode", help="name of the file under results/")
    return parser.parse_args()


class DecodeBench:
    """A model with random weights, and batches of rows for it."""

    def __init__(self, options: argparse.Namespace, device: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from benchmarks.harness.device_rates import measure_bandwidth
        from ray_abliterate.ablation.virtual_edits import VirtualEdits
        from ray_abliterate.ablation.weight_cache import WeightCache
        from ray_abliterate.data.builtin.demo_model import build_base_model, demo_base_folder
        from ray_abliterate.model.architecture import find_writers
        from ray_abliterate.model.language_model import LanguageModel
        from ray_abliterate.recipe import ModelSettings

        self.options, self.device = options, device
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SHAPES[options.shape])
        dtype = getattr(torch, options.dtype)
        with device:
            module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(build_base_model(demo_base_folder()))
        self.model = LanguageModel(module, tokenizer, ModelSettings(name="random"))
        engine = self.model._engine
        assert engine is not None, self.model.not_packable
        engine._ends = frozenset()  # answers are as long as they may be
        self.engine = engine
        self.writers = find_writers(module)
        cache = WeightCache(module, self.writers)
        cache.attach(self.model)
        self.edits = VirtualEdits(self.model.packed, cache)
        parameters = {id(p): p for p in module.parameters()}
        embeddings = module.get_input_embeddings().weight
        if not config.tie_word_embeddings:
            del parameters[id(embeddings)]  # a step looks up a few rows of it
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
        self.bandwidth = measure_bandwidth(device)

    def measure(self, count: int) -> dict[str, Any]:
        """Return milliseconds of a step of so many trials, and its floor."""
        import torch

        from ray_abliterate.directions.directions import Directions
        from ray_abliterate.search.plan import ModelShape, Plan

        options, layers = self.options, len(self.model.blocks)
        hidden = self.model.module.config.hidden_size
        components = tuple(sorted({w.component for w in self.writers}))
        shape = ModelShape(layers, hidden, components)
        vectors = torch.nn.functional.normalize(torch.randn(layers, hidden), dim=-1)
        directions = Directions(vectors, "random", {})
        prompt = [3 + i % 7 for i in range(options.prompt)]
        batch = self.engine.batch([prompt] * options.rows)
        milliseconds: dict[str, float] = {}
        with self.edits.applied([Plan.uniform(shape, layers / 2, "row")] * count, directions):
            with_graphs = {"recorded": True, "launched": False}
            if self.engine.decoder.graphs is None:
                del with_graphs["recorded"]
            for name, recorded in with_graphs.items():
                self.engine.techniques = replace(self.engine.techniques, recorded_steps=recorded)
                milliseconds[f"{name}_ms"] = round(1000 * self._step_seconds(batch, count), 3)
        stored = (
            self.engine.kv_bytes_per_token or self.model.memory_cost.kv
        )  # keys and values of a token
        positions = options.prompt + options.tokens / 2  # on average
        read = self.weight_bytes + stored * options.rows * count * positions
        floor = round(1000 * read / self.bandwidth, 3)
        best = min(milliseconds.values())
        return milliseconds | {
            "floor_ms": floor,
            "over_floor": round(best / floor, 2),
            "ms_per_trial": round(best / count, 3),
        }

    def _step_seconds(self, batch: Any, count: int) -> float:
        """Return the seconds of a step: the median of all rounds after a first one."""
        seconds: list[float] = []
        for _ in range(ROUNDS + 1):
            long = self._answer_seconds(batch, count, self.options.tokens)
            short = self._answer_seconds(batch, count, SHORT_TOKENS)
            seconds.append((long - short) / (self.options.tokens - SHORT_TOKENS))
        return statistics.median(seconds[1:])

    def _answer_seconds(self, batch: Any, count: int, tokens: int) -> float:
        from benchmarks.harness.device_rates import synchronize

        rows, edits = range(len(batch.rows)), tuple(range(count))
        synchronize(self.device)
        started = time.perf_counter()
        self.engine.answer(batch, tokens, [None] * count, rows, edits)
        synchronize(self.device)
        return time.perf_counter() - started


def decode_table(figures: Figures) -> list[str]:
    """Return decode steps by trials per pass, and their floor."""
    titles = {"recorded_ms": "recorded step, ms", "launched_ms": "launched step, ms"}
    measured = [name for name in titles if name in figures["measured"][0]]

    def milliseconds(name: str) -> Callable[[Any], str]:
        return lambda row: f"{row[name]:.1f}"

    columns = {
        "trials a pass": lambda row: row["per_pass"],
        **{titles[name]: milliseconds(name) for name in measured},
        "floor, ms": lambda row: f"{row['floor_ms']:.1f}",
        "over floor": lambda row: f"{row['over_floor']:.2f}",
        "ms a trial": lambda row: f"{row['ms_per_trial']:.1f}",
    }
    setting = (
        f"{figures['shape']} in {figures['dtype']} with random weights on {figures['device']}: "
        f"{figures['rows']} prompts of {figures['prompt']} tokens, answers of {figures['tokens']}; "
        f"reads {figures['bytes_per_s'] / 1e9:.0f} GB/s."
    )
    return [setting, "", *column_table(columns, figures["measured"])]


CLAIM = Claim(
    "decode_step",
    "The time of a decode step against the time to read the weights, by trials per pass.",
    "decode",
    {"decode": decode_table},
)

if __name__ == "__main__":
    main()
