"""A decode step beside what reading the weights takes, for one trial and for several a pass.

    python -m benchmarks.decode_step [--shape llama-8b] [--rows 100] [--prompt 60] [--tokens 100]
        [--per-pass 1 2 4 8] [--dtype bfloat16]

The model has random weights, on a GPU if there is one. A step's time is what longer answers take
longer, so that all it needs is in it: reading tokens back, Python, launches. On a GPU it is
measured with recorded steps and without. The floor is the time to read the weights, and the keys
and values of all rows, once.
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.harness.record import save

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
SHORT = 4
"""Tokens of the short answers, whose time is taken off."""
ROUNDS = 3


def main() -> None:
    """Measure, print, save."""
    options = read_options()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(options, device)
    rows = []
    for count in options.per_pass:
        rows.append({"per_pass": count, **case.measure(count)})
        print(rows[-1], flush=True)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    figures = {
        "shape": options.shape,
        "dtype": options.dtype,
        "rows": options.rows,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "device": shown,
        "bytes_per_s": case.bandwidth,
        "weight_bytes": case.weight_bytes,
        "measured": rows,
    }
    print(save("decode", figures, options.save))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="smollm2-135m")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--rows", type=int, default=100, help="prompts of a trial")
    add("--prompt", type=int, default=60, help="tokens of each")
    add("--tokens", type=int, default=100, help="of an answer")
    add("--per-pass", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--save", default="decode", help="name of the file under results/")
    return parser.parse_args()


class Case:
    """A model with random weights, and batches of rows for it."""

    def __init__(self, options: argparse.Namespace, device: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from benchmarks.harness.rates import bandwidth
        from ray_abliterate.ablation.virtual_edits import VirtualEdits
        from ray_abliterate.ablation.weight_cache import WeightCache
        from ray_abliterate.data.builtin.demo_model import base_folder, build_base_model
        from ray_abliterate.model.architecture import find_writers
        from ray_abliterate.model.language_model import LanguageModel
        from ray_abliterate.recipe import ModelSettings

        self.options, self.device = options, device
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SHAPES[options.shape])
        dtype = getattr(torch, options.dtype)
        with device:
            module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(build_base_model(base_folder()))
        self.model = LanguageModel(module, tokenizer, ModelSettings(name="random"))
        engine = self.model._engine
        assert engine is not None, self.model.not_packable
        engine._ends = frozenset()  # answers are as long as they may be
        self.engine = engine
        self.writers = find_writers(module)
        self.edits = VirtualEdits(self.model.packed, WeightCache(module, self.writers))
        parameters = {id(p): p for p in module.parameters()}
        table = module.get_input_embeddings().weight
        if not config.tie_word_embeddings:
            del parameters[id(table)]  # a step looks up a few rows of it
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
        self.bandwidth = bandwidth(device)

    def measure(self, count: int) -> dict[str, Any]:
        """Milliseconds of a step of so many trials, and their floor."""
        from dataclasses import replace

        import torch

        from ray_abliterate.directions.directions import Directions
        from ray_abliterate.search.plan import ModelShape, Plan

        options, layers = self.options, len(self.model.blocks)
        hidden = self.model.module.config.hidden_size
        components = tuple(sorted({w.component for w in self.writers}))
        shape = ModelShape(layers, hidden, components)
        vectors = torch.nn.functional.normalize(torch.randn(layers, hidden), dim=-1)
        directions = Directions(vectors, "random", {})
        row = [3 + i % 7 for i in range(options.prompt)]
        batch = self.engine.batch([row] * options.rows)
        found: dict[str, Any] = {}
        with self.edits.opened([Plan.uniform(shape, layers / 2, "row")] * count, directions):
            ways = {"recorded": True, "launched": False}
            if self.engine.decoder.recorded is None:
                del ways["recorded"]
            for name, recorded in ways.items():
                self.engine.techniques = replace(self.engine.techniques, recorded_steps=recorded)
                found[f"{name}_ms"] = round(1000 * self._step(batch, count), 3)
        kept = self.engine.kept_bytes or self.model.cost.kept
        seen = options.prompt + options.tokens / 2
        read = self.weight_bytes + kept * options.rows * count * seen
        found["floor_ms"] = round(1000 * read / self.bandwidth, 3)
        best = min(value for key, value in found.items() if key != "floor_ms")
        return found | {
            "over_floor": round(best / found["floor_ms"], 2),
            "ms_per_trial": round(best / count, 3),
        }

    def _step(self, batch: Any, count: int) -> float:
        """Seconds, the median of rounds after one that is not counted."""
        found = []
        for _ in range(ROUNDS + 1):
            long = self._answer(batch, count, self.options.tokens)
            short = self._answer(batch, count, SHORT)
            found.append((long - short) / (self.options.tokens - SHORT))
        return statistics.median(found[1:])

    def _answer(self, batch: Any, count: int, tokens: int) -> float:
        from benchmarks.harness.rates import wait

        every, edits = range(len(batch.rows)), tuple(range(count))
        wait(self.device)
        started = time.perf_counter()
        self.engine.answer(batch, tokens, [None] * count, every, edits)
        wait(self.device)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
