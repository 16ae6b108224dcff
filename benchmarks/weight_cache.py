"""What the weight cache holds, and what switching trials costs against reloading from disk.

    python -m benchmarks.weight_cache [--rounds 5]

On the demo model: bytes of the cache against the whole model's; seconds to apply a plan that edits
every writer (`row` mode, products known), to restore, and, interleaved with them, to load the whole
state dict from the safetensors file again (page cache warm, the baseline's best case).
"""

import statistics
import time
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table


def main() -> None:
    """Measure applying, restoring and reloading, print, save."""
    parser = CLAIM.parser(rounds=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    import torch
    from safetensors.torch import load_file

    from ray_abliterate.ablation.weight_cache import WeightCache
    from ray_abliterate.data.builtin.demo_model import build_demo_model, demo_folder
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.model.architecture import find_writers
    from ray_abliterate.model.loading import load_model
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.plan import ModelShape, Plan

    folder = build_demo_model(demo_folder())
    module: Any
    module, _ = load_model(str(folder), ModelSettings(name="demo"))
    writers = find_writers(module)
    cache = WeightCache(module, writers)
    layers, hidden = writers[-1].layer + 1, module.config.hidden_size
    vectors = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(0))
    directions = Directions(torch.nn.functional.normalize(vectors, dim=-1), "random", {})
    shape = ModelShape(layers, hidden, tuple(sorted({w.component for w in writers})))
    plan = Plan.uniform(shape, 12.5, "row")
    with cache.edited(plan, directions):
        pass  # the products are computed once per run
    seconds: dict[str, list[float]] = {"apply": [], "restore": [], "reload": []}
    for _ in range(options.rounds):
        started = time.perf_counter()
        with cache.edited(plan, directions):
            seconds["apply"].append(time.perf_counter() - started)
            started = time.perf_counter()
        seconds["restore"].append(time.perf_counter() - started)
        started = time.perf_counter()
        module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        seconds["reload"].append(time.perf_counter() - started)
    figures = summarize(module, cache.bytes, seconds)
    CLAIM.save(figures, options)
    print(f"cache: {figures['cache_share']:.1%} of the model")
    print(f"restore is {figures['reload_over_restore']} times faster than reload")


def summarize(module: Any, cache_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures.

    Args:
        module: The model.
        cache_bytes: Bytes of its weight cache.
        seconds: Times of each round to `apply`, `restore` and `reload`.
    """
    model_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": "SmolLM2-135M-Instruct (demo), float32",
        "model_bytes": model_bytes,
        "cache_bytes": cache_bytes,
        "cache_share": round(cache_bytes / model_bytes, 4),
        **{f"{name}_seconds": [round(x, 4) for x in values] for name, values in seconds.items()},
        "reload_over_restore": round(median["reload"] / median["restore"], 1),
        "reload_over_switch": round(median["reload"] / (median["apply"] + median["restore"]), 1),
    }


def weights_table(figures: Figures) -> list[str]:
    """Return the size of the weight cache, and how much faster it is than reloading."""
    columns = {
        "cache, share of the model": lambda row: f"{100 * row['cache_share']:.0f} %",
        "reload from the page cache over restore": lambda row: row["reload_over_restore"],
    }
    return column_table(columns, [figures])


CLAIM = Claim(
    "weight_cache",
    "What the weight cache holds, and what switching trials costs against reloading from disk.",
    "weight_cache",
    {"weight-cache": weights_table},
)

if __name__ == "__main__":
    main()
