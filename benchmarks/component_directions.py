"""What edits with directions of components' own do, compared with those of the residual stream.

    OMP_NUM_THREADS=1 python -m benchmarks.component_directions

The demo's model and recipe, in this process, without Ray. Strength 1 everywhere, so that nothing
but directions differs: each layer's own, and one layer's in all of them. The figures also say how
alike directions of neighbouring layers are. It takes two or three minutes on a core.
"""

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import cross_table

LAYERS = (12, 18, 24)
"""Layers of the model's 30 from which one direction for all of them is taken."""
RECIPE = Path(__file__).parents[1] / "configs" / "demo.toml"


def main() -> None:
    """Score plans with both kinds of directions, print, save."""
    parser = CLAIM.parser(scored=4, layers=[18])
    parser.add_argument(
        "--scored", type=int, default=32, help="prompts of each set that plans are scored on"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    options = parser.parse_args()
    from ray_abliterate.search.plan import Plan

    replica, directions = prepare(options.scored)
    shape = replica.describe().shape
    rows = []
    for name, used in (("stream", directions.with_components({})), ("own", directions)):
        for layer in (None, *options.layers):
            plan = Plan.uniform(shape, float(layer or 0), "row")
            plan = replace(plan, scope="per-layer") if layer is None else plan
            rows.append({"directions": name, "layer": layer, **score(replica, plan, used)})
            print(rows[-1], flush=True)
    by_part = {"stream": directions, **directions.components}
    figures = {
        "scored": options.scored,
        "base": score(replica, Plan.nothing(), directions),
        "measured": rows,
        "neighbours": {name: neighbour_cosines(part.vectors) for name, part in by_part.items()},
    }
    CLAIM.save(figures, options)


def prepare(scored: int) -> tuple[Any, Any]:
    """Return the demo's replica, and the directions of its recipe, those of components included.

    Args:
        scored: Prompts of each set that plans are scored on.
    """
    from ray_abliterate.data.builtin.demo_model import build_demo_model, demo_folder
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.directions.compute import directions_from_residuals
    from ray_abliterate.directions.residuals.residual_set import Residuals
    from ray_abliterate.model.architecture import find_writers
    from ray_abliterate.model.component_outputs import component_modules
    from ray_abliterate.recipe import Recipe
    from ray_abliterate.replica.replica import Replica

    recipe = Recipe.load(RECIPE)
    prompts = recipe.prompts
    assert prompts.behaviour is not None and prompts.neutral is not None
    sources = {"behaviour": prompts.behaviour, "neutral": prompts.neutral}
    scored_sets = {
        s.name: load_prompt_set(s.name, s.prompts, RECIPE.parent).subset(range(scored))
        for s in recipe.scorers
        if s.prompts is not None
    }
    replica = Replica(recipe, str(build_demo_model(demo_folder())), scored_sets)
    replica.model.use(replica.tune())
    layers, components = len(replica.model.blocks), replica.describe().shape.components
    modules = component_modules(replica.model.module, find_writers(replica.model.module), layers)
    behaviour, neutral = (  # (prompt, layer of the stream and then of each component, hidden)
        replica.model.residuals(load_prompt_set(n, s, RECIPE.parent).prompts, components=modules)
        for n, s in sources.items()
    )
    stream, *by_component = [
        directions_from_residuals(
            Residuals(behaviour[:, first : first + layers].contiguous()),
            Residuals(neutral[:, first : first + layers].contiguous()),
            recipe.direction,
        )
        for first in range(0, behaviour.shape[1], layers)
    ]
    return replica, stream.with_components(dict(zip(components, by_component, strict=True)))


def score(replica: Any, plan: Any, directions: Any) -> dict[str, float]:
    """Return the rate and the KL divergence of a plan."""
    from ray_abliterate.replica.messages import TrialSetup

    rate, divergence = replica.evaluate(plan, TrialSetup(directions)).scorecard.losses
    return {"rate": round(rate, 4), "divergence": round(divergence, 4)}


def neighbour_cosines(vectors: Any) -> dict[str, float]:
    """Return median and extremes of the cosines of neighbouring layers' directions."""
    cosines = [float(one @ other) for one, other in pairwise(vectors)]
    middle, least, most = statistics.median(cosines), min(cosines), max(cosines)
    return {"median": round(middle, 2), "least": round(least, 2), "most": round(most, 2)}


def components_table(figures: Figures) -> list[str]:
    """Return rate and divergence with the stream's directions and with those of components."""
    rows = {(row["directions"], row["layer"]): row for row in figures["measured"]}
    lines: dict[str, Any] = {
        "each layer's own" if layer is None else f"layer {layer}'s in all": layer
        for layer in dict.fromkeys(layer for _, layer in rows)
    }
    base = "no edit"
    rows["stream", base] = {**figures["base"], "divergence": 0}

    def cell(layer: Any, directions: str) -> str:
        row = rows.get((directions, layer))
        if row is None:
            return ""
        divergence = f"{row['divergence']:.2f}" if layer != base else "0"
        return f"{row['rate']:.2f}, {divergence} nats"

    cosines = ", ".join(
        f"{own['median']:.2f} ({own['least']:.2f} to {own['most']:.2f}) in `{name}`"
        for name, own in figures["neighbours"].items()
    )
    columns = {"the stream's": "stream", "components' own": "own"}
    return [
        *cross_table("demo model, strength 1 everywhere", {**lines, base: base}, columns, cell),
        "",
        f"What is left of the behaviour (rate, {figures['scored']} prompts), and divergence. "
        f"Cosines of neighbouring layers' directions, median and range: {cosines}.",
    ]


CLAIM = Claim(
    "component_directions",
    "What edits with components' own directions do, compared with those of the residual stream.",
    "components",
    {"components": components_table},
)

if __name__ == "__main__":
    main()
