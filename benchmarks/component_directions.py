"""What edits with directions of components' own do, beside those with the stream's.

    OMP_NUM_THREADS=1 python -m benchmarks.component_directions

The demo's model and recipe, in this process, without Ray. Strength 1 everywhere, so that nothing
but directions differs: each layer's own, and one layer's in all of them. Beside that, how alike
directions of neighbouring layers are. It takes two or three minutes on a core.
"""

import argparse
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save

SCORED = 32
"""Prompts of each set that plans are scored on."""
LAYERS = (12, 18, 24)
"""Of the model's 30, where one direction for all of them is taken."""
RECIPE = Path(__file__).parents[1] / "configs" / "demo.toml"


def main() -> None:
    """Measure, print, save."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    from ray_abliterate.search.plan import Plan

    replica, directions = prepared()
    shape = replica.describe().shape
    rows = []
    for which, given in (("stream", directions.with_components({})), ("own", directions)):
        for layer in (None, *LAYERS):
            plan = Plan.uniform(shape, float(layer or 0), "row")
            plan = replace(plan, scope="per-layer") if layer is None else plan
            rows.append({"directions": which, "layer": layer, **scores(replica, plan, given)})
            print(rows[-1], flush=True)
    parts = {"stream": directions, **directions.components}
    cosines = {name: neighbours(own.vectors) for name, own in parts.items()}
    base = scores(replica, Plan.nothing(), directions)
    print(
        save(
            "components", {"scored": SCORED, "base": base, "measured": rows, "neighbours": cosines}
        )
    )


def prepared() -> tuple[Any, Any]:
    """The demo's replica, and the directions of its recipe, of components too."""
    from ray_abliterate.data.builtin.demo_model import build_demo_model, default_folder
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.directions.compute import directions_from_residuals
    from ray_abliterate.directions.residuals.residual_set import Residuals
    from ray_abliterate.model.architecture import find_writers
    from ray_abliterate.model.component_outputs import contributing
    from ray_abliterate.recipe import Recipe
    from ray_abliterate.replica.replica import Replica

    recipe = Recipe.load(RECIPE)
    given = {"behaviour": recipe.prompts.behaviour, "neutral": recipe.prompts.neutral}
    scored = {
        s.name: load_prompt_set(s.name, s.prompts, RECIPE.parent).only(range(SCORED))
        for s in recipe.scorers
    }
    replica = Replica(recipe, str(build_demo_model(default_folder())), scored)
    replica.model.use(replica.tune())
    layers, components = len(replica.model.blocks), replica.describe().shape.components
    places = contributing(replica.model.module, find_writers(replica.model.module), layers)
    values = [
        replica.model.residuals(load_prompt_set(n, s, RECIPE.parent).prompts, more=places)
        for n, s in given.items()
    ]
    found = [
        directions_from_residuals(
            *(Residuals(v[:, first : first + layers].contiguous()) for v in values),
            recipe.direction,
        )
        for first in range(0, values[0].shape[1], layers)
    ]
    return replica, found[0].with_components(dict(zip(components, found[1:], strict=True)))


def scores(replica: Any, plan: Any, directions: Any) -> dict[str, float]:
    """Rate and divergence of a plan."""
    from ray_abliterate.replica.replica import Setup

    rate, divergence = replica.evaluate(plan, Setup(directions)).scorecard.losses
    return {"rate": round(rate, 4), "divergence": round(divergence, 4)}


def neighbours(vectors: Any) -> dict[str, float]:
    """Cosines of directions of neighbouring layers: median and extremes."""
    found = [float(one @ other) for one, other in pairwise(vectors)]
    middle = statistics.median(found)
    return {"median": round(middle, 2), "least": round(min(found), 2), "most": round(max(found), 2)}


if __name__ == "__main__":
    main()
