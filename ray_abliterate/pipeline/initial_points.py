"""The plans that a search begins with: full strength along one layer's direction, and the middle.

The layer is chosen by how well directions separate held-out prompts of the two sets, which costs
no pass of the model, or by what they do to held-out prompts, tried on all replicas, a layer a call.
"""

from collections.abc import Callable, Mapping, Sequence

from ray_abliterate.cluster.residual_shards import ResidualShards
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.layer_selection import LayerSelection, tried_layers
from ray_abliterate.directions.layer_separation import best_layer
from ray_abliterate.directions.residuals.shard import content_key
from ray_abliterate.pipeline.directory import Baseline
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.recipe import KlDivergence, Recipe, RefusalLogOdds
from ray_abliterate.replica.messages import EffectPrompts, ReplicaApi, TrialSetup
from ray_abliterate.search.plan import ParameterValue
from ray_abliterate.search.space import RealRange, SearchSpace

MOST_PROMPTS = 32
"""Prompts of each set that layers are tried on: as many as in Arditi et al. (2024)."""


def try_layers(
    context: RunContext,
    scored: Mapping[str, PromptSet],
    setup: TrialSetup,
    shards: ResidualShards | None,
) -> None:
    """Try each layer's direction on held-out prompts, if the search is to begin with the best.

    Args:
        context: The run.
        scored: Prompts of the scorers, by the scorer's name.
        setup: Holds the directions.
        shards: The residuals; None if the run directory has the baseline.
    """
    recipe = context.recipe
    if recipe.search.seeds != "log-odds":
        return

    def separation() -> Sequence[Mapping[str, float]]:
        baseline = context.directory.baseline()
        if baseline is not None or shards is None:
            assert baseline is not None
            return baseline.separation
        return shards.separation(setup.directions, recipe.direction)

    select_layer(context, effect_prompts(recipe, scored), setup, separation)


def effect_prompts(recipe: Recipe, scored: Mapping[str, PromptSet]) -> EffectPrompts:
    """Return the prompts that layers are tried on: the scorers', held out from the directions.

    The recipe has a `refusal-log-odds` and a `kl-divergence` scorer, or it would have been refused.
    """
    odds = next(s for s in recipe.scorers if isinstance(s, RefusalLogOdds))
    divergence = next(s for s in recipe.scorers if isinstance(s, KlDivergence))
    behaviour, neutral = (scored[s.name].prompts[:MOST_PROMPTS] for s in (odds, divergence))
    return EffectPrompts(behaviour, neutral, odds.openings)


def select_layer(
    context: RunContext,
    prompts: EffectPrompts,
    setup: TrialSetup,
    separation: Callable[[], Sequence[Mapping[str, float]]],
) -> LayerSelection:
    """Try every layer's direction, or return what the run directory holds of the same attempt.

    Args:
        context: The run; its directory keeps the result.
        prompts: The held-out prompts.
        setup: Holds the directions.
        separation: Returns a row per layer as `layer_separation.separation` gives it, whose `gap`
            is how far the direction is added; called only if layers have to be tried.
    """
    directory, pool = context.directory, context.pool
    key = _selection_key(prompts, setup)
    stored = directory.selection()
    if stored is not None and stored.key == key:
        return stored
    directions = setup.directions
    gaps = [row["gap"] for row in separation()]
    layers, shared_setup = tried_layers(directions.usable), pool.put(setup)
    scores = []
    with context.progress.stage("directions, layer by layer"):
        calls = [(prompts, layer, gaps[layer], shared_setup.argument) for layer in layers]
        for layer_scores in pool.map(ReplicaApi.direction_effect, calls):
            scores.append(layer_scores)
            context.progress.step(len(scores), len(layers))
    ordered = tuple(sorted(scores, key=lambda one: one.layer))
    selection = LayerSelection(key, directions.method, directions.layers, ordered)
    directory.save_selection(selection)
    context.progress.note(selection.sentence())
    return selection


def _selection_key(prompts: EffectPrompts, setup: TrialSetup) -> str:
    sets = (PromptSet("", one).fingerprint for one in (prompts.behaviour, prompts.neutral))
    return content_key(setup=setup.key, prompts=list(sets), openings=prompts.openings)


def initial_points(
    context: RunContext, space: SearchSpace, baseline: Baseline
) -> tuple[dict[str, ParameterValue], ...]:
    """Return the points that a new search tries first, as `search.seeds` of the recipe says.

    Args:
        context: The run; its directory holds the layers' scores, and is told which layer it is.
        space: The search space.
        baseline: How well each layer's direction separates the sets.

    Where the recipe's wish can't be followed, the run gets a warning.
    """
    criterion = context.recipe.search.seeds
    if criterion == "none":
        return ()
    measure = "fisher" if criterion == "log-odds" else criterion.replace("-", "_")
    layer = best_layer(list(baseline.separation), measure)
    if not any(row["fisher"] for row in baseline.separation):
        context.record.warn(
            "search.seeds: no layer could be measured on prompts that its direction was not "
            f"computed from; layer {layer} is the one whose means lie farthest apart. "
            "Give more prompts"
        )
    if criterion == "log-odds":
        layer = _layer_by_log_odds(context, space, layer)
    first, middle = space.initial_points(float(layer))
    context.directory.record_facts(
        seeds={"by": criterion, "layer": layer, "taken": first["direction_layer"]}
    )
    return first, middle


def _layer_by_log_odds(context: RunContext, space: SearchSpace, otherwise: int) -> int:
    """Return the layer that was selected by log-odds, or `otherwise` if none passed."""
    selection = context.directory.selection()
    chosen = selection.chosen if selection else None
    if chosen is None:
        context.record.warn(
            "search.seeds: no layer's direction passes by log-odds (ray-abliterate show "
            f"{context.directory.path}); the first plan takes layer {otherwise}, which separates "
            "best"
        )
        return otherwise
    bounds = dict(space.parameters)["direction_layer"]
    if isinstance(bounds, RealRange) and bounds.clamp(chosen.layer) != chosen.layer:
        context.record.warn(
            f"search.seeds: layer {chosen.layer} is the best by log-odds, but "
            f"search.space.direction_layer reaches from layer {bounds.low:.1f} to "
            f"{bounds.high:.1f}; the first plan takes the nearest of these"
        )
    return chosen.layer
