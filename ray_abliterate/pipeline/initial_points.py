"""Where a search begins: the layer whose direction its first plan takes out everywhere.

By how well layers tell held-out prompts of the two sets apart, which costs no pass of the model, or
by what their directions do to held-out prompts, tried on all replicas, a layer a call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_selection import Selection, tried_layers
from ray_abliterate.directions.layer_separation import best_layer
from ray_abliterate.directions.residuals.shard import content_key
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.recipe import KlDivergence, Recipe, RefusalLogOdds
from ray_abliterate.replica.direction_effects import Probe
from ray_abliterate.replica.replica import Setup
from ray_abliterate.search.plan import Range, Space, Value

MOST_PROMPTS = 32
"""Of each set that layers are tried on: as many as in the paper."""

Row = Mapping[str, float]


def probe_of(recipe: Recipe, scored: Mapping[str, PromptSet]) -> Probe:
    """What layers are tried on: prompts of the recipe's scorers, which no direction was found from.

    The recipe has both scorers, or it would have been refused.
    """
    odds = next(s for s in recipe.scorers if isinstance(s, RefusalLogOdds))
    kept = next(s for s in recipe.scorers if isinstance(s, KlDivergence))
    behaviour, neutral = (scored[s.name].prompts[:MOST_PROMPTS] for s in (odds, kept))
    return Probe(behaviour, neutral, odds.openings)


def select_layer(
    directory: RunDirectory,
    pool: Any,
    probe: Probe,
    setup: Setup,
    rows: Callable[[], Sequence[Row]],
    watch: Watch,
) -> Selection:
    """Try every layer's direction; taken up from the directory if it is known.

    Args:
        directory: Keeps what was found.
        pool: The replicas.
        probe: The prompts.
        setup: With the directions.
        rows: How the sets lie along them, as `directions.separation` gives it; asked if needed.
        watch: Is told how far it is.
    """
    key = _key(probe, setup)
    known = directory.selection()
    if known is not None and known.key == key:
        return known
    directions: Directions = setup.directions
    gaps = [row["gap"] for row in rows()]
    layers, shared = tried_layers(directions.usable), pool.put(setup)
    found = []
    with watch.stage("directions, layer by layer"):
        calls = [(probe, layer, gaps[layer], shared) for layer in layers]
        for one in pool.map("probe", calls):
            found.append(one)
            watch.step(len(found), len(layers))
    ordered = tuple(sorted(found, key=lambda one: one.layer))
    selection = Selection(key, directions.method, directions.layers, ordered)
    directory.save_selection(selection)
    watch.note(selection.sentence())
    return selection


def _key(probe: Probe, setup: Setup) -> str:
    sets = (PromptSet("", prompts).fingerprint for prompts in (probe.behaviour, probe.neutral))
    return content_key(setup=setup.key, prompts=list(sets), openings=probe.openings)


def seed_points(
    recipe: Recipe,
    directory: RunDirectory,
    space: Space,
    baseline: Baseline,
    warn: Callable[[str], None],
) -> tuple[dict[str, Value], ...]:
    """The plans that a search begins with.

    Args:
        recipe: Says how they are chosen.
        directory: Holds what was found of layers; is told which one it is.
        space: The search space.
        baseline: How well layers tell the sets apart.
        warn: Is told where the recipe's wish can't be followed.
    """
    by = recipe.search.seeds
    if by == "none":
        return ()
    measure = "fisher" if by == "log-odds" else by.replace("-", "_")
    layer = best_layer(list(baseline.separation), measure)
    if not any(row["fisher"] for row in baseline.separation):
        warn(
            "search.seeds: no layer could be measured on prompts that its direction was not found "
            f"from; layer {layer} is the one whose means lie farthest apart. Give more prompts"
        )
    if by == "log-odds":
        layer = _chosen(directory, space, layer, warn)
    first, middle = space.seeds(float(layer))
    directory.note(seeds={"by": by, "layer": layer, "taken": first["direction_layer"]})
    return first, middle


def _chosen(
    directory: RunDirectory, space: Space, otherwise: int, warn: Callable[[str], None]
) -> int:
    """The layer that was chosen by log-odds, or another one."""
    selection = directory.selection()
    chosen = selection.chosen if selection else None
    if chosen is None:
        warn(
            "search.seeds: no layer's direction passes by log-odds (ray-abliterate show "
            f"{directory.path}); the first plan takes layer {otherwise}, which separates best"
        )
        return otherwise
    bounds = dict(space.parameters)["direction_layer"]
    if isinstance(bounds, Range) and bounds.clamp(chosen.layer) != chosen.layer:
        warn(
            f"search.seeds: layer {chosen.layer} is the best by log-odds, but "
            f"search.space.direction_layer reaches from layer {bounds.low:.1f} to "
            f"{bounds.high:.1f}; the first plan takes the nearest of these"
        )
    return chosen.layer
