"""How well scores on quantized weights predict scores in full precision.

    python -m benchmarks.quantized_scores [--plans 8] [--prompts 24] [--kinds nf4 torchao-int8]

The demo model, plans of a recorded study (spread over its KL divergences). Each kind extracts its
own residuals and directions, as a search on it does; its scores are held against those of the same
plans in full precision.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save

RECIPE = """
[model]
name = "demo"
{quantization}

[prompts]
behaviour = {{ builtin = "cooking-train", split = "[:{prompts}]" }}
neutral = {{ builtin = "other-train", split = "[:{prompts}]" }}

[[scorers]]
kind = "keyword-rate"
prompts = {{ builtin = "cooking-heldout", split = "[:{prompts}]" }}
markers = "strict"
max_new_tokens = 16

[[scorers]]
kind = "kl-divergence"
prompts = {{ builtin = "other-heldout", split = "[:{prompts}]" }}
"""
PLANS = Path(__file__).parent / "results" / "demo_plans.jsonl"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", default=["nf4", "torchao-int8"])
    options = parser.parse_args()
    plans = spread(options.plans)
    kinds = {kind: measured(kind, plans, options.prompts) for kind in ("", *options.kinds)}
    full = kinds.pop("")
    figures = {
        "plans": len(plans),
        "prompts": options.prompts,
        "full": full,
        "kinds": {kind: found | compared(found, full) for kind, found in kinds.items()},
    }
    print(save("quantized", figures))


def spread(count: int) -> list[dict[str, Any]]:
    """Plans of the recorded study, at even ranks of their KL divergence."""
    rows = [json.loads(line) for line in PLANS.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["kl"])
    return [rows[round(i * (len(rows) - 1) / (count - 1))]["plan"] for i in range(count)]


def measured(kind: str, plans: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """Bytes, seconds and scores of one kind."""
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.directions.compute import compute
    from ray_abliterate.directions.residuals.residual_set import join
    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.model.source import model_source
    from ray_abliterate.pipeline.progress import Unwatched
    from ray_abliterate.recipe import Recipe
    from ray_abliterate.replica.replica import Replica, Setup
    from ray_abliterate.search.plan import Plan

    line = f'quantization = "{kind}"' if kind else ""
    recipe = Recipe.parse(RECIPE.format(quantization=line, prompts=prompts), "recipe.toml")
    sets = {s.name: load_prompt_set(s.name, s.prompts, Path()) for s in recipe.scorers}
    replica = Replica(recipe, model_source("demo", Unwatched().note), sets)
    both = [
        load_prompt_set(n, getattr(recipe.prompts, n), Path()) for n in ("behaviour", "neutral")
    ]
    shards = [ResidualShard(replica.residuals(s.name, 0, s.prompts, ())) for s in both]
    directions = compute(*(join([shard]) for shard in shards), recipe.direction)
    setup = Setup(directions)
    replica.evaluate(Plan.nothing(), setup)
    scores: dict[str, list[float]] = {}
    seconds = []
    for values in plans:
        found = replica.evaluate(Plan.from_params(dict(values), values["norm"]), setup)
        seconds.append(found.seconds)
        for score in found.scorecard.scores:
            scores.setdefault(score.name, []).append(score.value)
        print(kind or "full", round(found.seconds, 1), flush=True)
    facts = replica.describe()
    return {
        "model_bytes": facts.model_bytes,
        "cache_bytes": facts.cache_bytes,
        "quantization": facts.quantization,
        "seconds": [round(s, 2) for s in seconds],
        "scores": scores,
    }


def compared(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Mean distance, and correlation of ranks, by score."""
    from scipy.stats import spearmanr

    known: dict[str, Any] = {}
    for name, values in found["scores"].items():
        pairs = list(zip(values, full["scores"][name], strict=True))
        known[name] = {
            "mean_difference": sum(abs(a - b) for a, b in pairs) / len(pairs),
            "rank_correlation": float(spearmanr(*zip(*pairs, strict=True)).statistic),
        }
    return {"predicts": known}


if __name__ == "__main__":
    main()
