"""What the weight cache holds, and what switching trials costs beside reloading from disk.

    python -m benchmarks.weight_cache [--rounds 5]

On the demo model: bytes of the cache against the whole model's; seconds to apply a plan that edits
every writer (`row` mode, products known), to restore, and, interleaved with them, to load the whole
state dict from the safetensors file again (page cache warm, the baseline's best case).
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.harness.record import save


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    import torch
    from safetensors.torch import load_file

    from ray_abliterate.ablation.weight_cache import WeightCache
    from ray_abliterate.data.builtin import demo_model as demo
    from ray_abliterate.directions.directions import Directions
    from ray_abliterate.model.architecture import find_writers
    from ray_abliterate.model.loading import load
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.plan import ModelShape, Plan

    folder = demo.build_demo_model(demo.default_folder())
    module, _ = load(str(folder), ModelSettings(name="demo"))
    writers = find_writers(module)
    cache = WeightCache(module, writers)
    layers, hidden = writers[-1].layer + 1, module.config.hidden_size
    rows = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(0))
    directions = Directions(torch.nn.functional.normalize(rows, dim=-1), "random", {})
    shape = ModelShape(layers, hidden, tuple(sorted({w.component for w in writers})))
    plan = Plan.uniform(shape, 12.5, "row")
    with cache.edited(plan, directions):
        pass  # the products are computed once per run
    applying, restoring, reloading = [], [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        with cache.edited(plan, directions):
            applying.append(time.perf_counter() - started)
            started = time.perf_counter()
        restoring.append(time.perf_counter() - started)
        started = time.perf_counter()
        module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        reloading.append(time.perf_counter() - started)
    figures = summary(module, cache.bytes, applying, restoring, reloading)
    print(save("weight_cache", figures))
    print(f"cache: {figures['cache_share']:.1%} of the model")
    print(f"restore is {figures['reload_over_restore']} times faster than reload")


def summary(
    module: Any,
    cache_bytes: int,
    applying: list[float],
    restoring: list[float],
    reloading: list[float],
) -> dict[str, Any]:
    """The figures."""
    model_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    apply, restore, reload = map(statistics.median, (applying, restoring, reloading))
    return {
        "model": "SmolLM2-135M-Instruct (demo), float32",
        "model_bytes": model_bytes,
        "cache_bytes": cache_bytes,
        "cache_share": round(cache_bytes / model_bytes, 4),
        "apply_seconds": [round(x, 4) for x in applying],
        "restore_seconds": [round(x, 4) for x in restoring],
        "reload_seconds": [round(x, 4) for x in reloading],
        "reload_over_restore": round(reload / restore, 1),
        "reload_over_switch": round(reload / (apply + restore), 1),
    }


if __name__ == "__main__":
    main()
