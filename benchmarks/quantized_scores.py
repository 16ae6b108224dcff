"""How well scores on quantized weights predict scores in full precision.

    python -m benchmarks.quantized_scores [--plans 8] [--prompts 24] [--kinds nf4 torchao-int8]

The demo model, and plans of a recorded study, spread over its KL divergences. Each kind of
quantization extracts residuals and directions of its own, as a search on it does; its scores are
held against those of the same plans in full precision.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.record import RESULTS
from benchmarks.harness.tables import column_table

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
PLANS = RESULTS / "demo_plans.jsonl"


def main() -> None:
    """Score the plans on every kind of weights, print, save."""
    parser = CLAIM.parser(plans=2, prompts=4, kinds=["nf4"])
    parser.add_argument("--plans", type=int, default=8, help="plans, 2 or more")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of each set")
    parser.add_argument("--kinds", nargs="+", default=["nf4", "torchao-int8"])
    options = parser.parse_args()
    plans = recorded_plans(options.plans)
    full = measure("", plans, options.prompts)
    kinds = {kind: measure(kind, plans, options.prompts) for kind in options.kinds}
    figures = {
        "plans": len(plans),
        "prompts": options.prompts,
        "full": full,
        "kinds": {
            kind: measured | {"predicts": compare_scores(measured["scores"], full["scores"])}
            for kind, measured in kinds.items()
        },
    }
    CLAIM.save(figures, options)


def recorded_plans(count: int) -> list[dict[str, Any]]:
    """Return plans of the recorded study, at even ranks of their KL divergence."""
    rows = [json.loads(line) for line in PLANS.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["kl"])
    return [rows[round(i * (len(rows) - 1) / (count - 1))]["plan"] for i in range(count)]


def measure(kind: str, plans: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """Return bytes, seconds and scores of one kind of weights.

    Args:
        kind: Quantization as a recipe names it; empty for full precision.
        plans: Plans as a recorded study has them.
        prompts: Prompts of each set.
    """
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.directions.compute import directions_from_residuals
    from ray_abliterate.directions.residuals.residual_set import Residuals, join
    from ray_abliterate.directions.residuals.shard import ResidualShard
    from ray_abliterate.model.source import resolve_model
    from ray_abliterate.pipeline.progress import SilentProgress
    from ray_abliterate.recipe import PromptSource, Recipe
    from ray_abliterate.replica.messages import TrialSetup
    from ray_abliterate.replica.replica import Replica
    from ray_abliterate.search.plan import Plan

    line = f'quantization = "{kind}"' if kind else ""
    recipe = Recipe.parse(RECIPE.format(quantization=line, prompts=prompts), "recipe.toml")
    scored = {
        s.name: load_prompt_set(s.name, s.prompts, Path())
        for s in recipe.scorers
        if s.prompts is not None
    }
    replica = Replica(recipe, resolve_model("demo", SilentProgress().note), scored)

    def residuals(name: str, source: PromptSource | None) -> Residuals:
        assert source is not None
        prompt_set = load_prompt_set(name, source, Path())
        record = replica.extract_residuals(name, 0, prompt_set.prompts, ())
        return join([ResidualShard(record)])

    behaviour = residuals("behaviour", recipe.prompts.behaviour)
    neutral = residuals("neutral", recipe.prompts.neutral)
    directions = directions_from_residuals(behaviour, neutral, recipe.direction)
    setup = TrialSetup(directions)
    replica.evaluate(Plan.nothing(), setup)
    scores: dict[str, list[float]] = {}
    seconds = []
    for params in plans:
        evaluation = replica.evaluate(Plan.from_params(dict(params), params["norm"]), setup)
        seconds.append(evaluation.seconds)
        for score in evaluation.scorecard.scores:
            scores.setdefault(score.name, []).append(score.value)
        print(kind or "full precision", round(evaluation.seconds, 1), flush=True)
    facts = replica.describe()
    return {
        "model_bytes": facts.model_bytes,
        "cache_bytes": facts.cache_bytes,
        "quantization": facts.quantization,
        "seconds": [round(s, 2) for s in seconds],
        "scores": scores,
    }


def compare_scores(
    scores: dict[str, list[float]], full: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Return the mean difference and the rank correlation, by score.

    Args:
        scores: Values of each plan on quantized weights, by score.
        full: The same in full precision.
    """
    from scipy.stats import spearmanr

    compared: dict[str, dict[str, float]] = {}
    for name, values in scores.items():
        pairs = list(zip(values, full[name], strict=True))
        compared[name] = {
            "mean_difference": sum(abs(a - b) for a, b in pairs) / len(pairs),
            "rank_correlation": float(spearmanr(*zip(*pairs, strict=True)).statistic),
        }
    return compared


def quantized_table(figures: Figures) -> list[str]:
    """Return size, agreement of scores and seconds by kind of weights."""
    rows = [("none (float32)", figures["full"])]
    rows += [(f"`{kind}`", measured) for kind, measured in figures["kinds"].items()]
    columns = {
        "quantization": lambda row: row[0],
        "model, with its weight cache": lambda row: _size(row[1]),
        "refusals: mean difference, rank correlation": lambda row: _agreement(
            row[1], "keyword-rate", ""
        ),
        "KL: mean difference, rank correlation": lambda row: _agreement(
            row[1], "kl-divergence", " nats"
        ),
        "seconds a plan": lambda row: _range(row[1]["seconds"], 1),
    }
    return column_table(columns, rows)


def _size(measured: dict[str, Any]) -> str:
    sizes = (measured["model_bytes"], measured["cache_bytes"])
    return " + ".join(f"{size / 1e6:.0f}" for size in sizes if size) + " MB"


def _agreement(measured: dict[str, Any], score: str, unit: str) -> str:
    """Return how well a score is predicted; in full precision, the range of its values."""
    if "predicts" not in measured:
        return _range(measured["scores"][score], 3) + unit
    predicts = measured["predicts"][score]
    return f"{predicts['mean_difference']:.3f}{unit}, {predicts['rank_correlation']:.2f}"


def _range(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


CLAIM = Claim(
    "quantized_scores",
    "How well scores on quantized weights predict scores in full precision.",
    "quantized",
    {"quantized": quantized_table},
)

if __name__ == "__main__":
    main()
