"""Analyses of a run's stored residuals, for `directions` and `residuals`: no Ray, no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from ray_abliterate.directions.comparison.compare import MethodComparison, best_row, compare_methods
from ray_abliterate.directions.layer_views import LayerView, view_layers
from ray_abliterate.directions.methods.recipe_methods import refuse_unknown_methods
from ray_abliterate.directions.methods.registry import METHODS
from ray_abliterate.errors import RecipeError, SearchError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.stored_residuals import stored_sets
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.search.frontier import Frontier, Trial


def methods_to_compare(
    settings: DirectionSettings, names: Sequence[str] = ()
) -> dict[str, DirectionSettings]:
    """Return the methods to compare, by name: all of the package and the recipe's own by default.

    The recipe's own keeps its options; all share what the recipe says about sparing.

    Args:
        settings: The recipe's.
        names: Methods to compare instead.

    Raises:
        RecipeError: there is no such method.
        ScoreError: a method's module cannot be imported.
    """
    methods = {}
    own = settings.method
    for name in names or (*METHODS, *(() if own in METHODS else (own,))):
        same = name == own
        change = {} if same else {"method": name, "options": {}, "ensemble": ()}
        try:
            methods[name] = DirectionSettings.model_validate(settings.model_dump() | change)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"--method {name}: {reason}") from None
        refuse_unknown_methods(methods[name])
    return methods


def compare_run(
    directory: RunDirectory,
    methods: dict[str, DirectionSettings],
    pairs: int,
    progress: Progress,
) -> MethodComparison:
    """Compare methods on the residuals of a run.

    Args:
        directory: The run's.
        methods: As `methods_to_compare` gives them.
        pairs: Pairs of disjoint samples that the stability of a method is measured on.
        progress: Display of stages and steps.

    Raises:
        RunDirectoryError: the run holds no residuals, or they are damaged.
        SearchError: no method has a direction.
    """
    with progress.stage("reading residuals"):
        behaviour, neutral = stored_sets(directory)
    with progress.stage("comparing methods"):
        try:
            return compare_methods(behaviour, neutral, methods, pairs, step=progress.step)
        except ValueError as error:
            raise SearchError(
                f"no method finds a direction in {directory.path}: {error}.\n"
                "  Check that prompts.behaviour and prompts.neutral are different prompts."
            ) from None


@dataclass(frozen=True)
class ResidualAnalysis:
    """What the residuals of a run look like, layer by layer.

    Attributes:
        views: A view per layer.
        best: The layer that separates the sets best.
        trial: Number of the trial whose strengths are shown; None if the run has none.
        strengths: The trial's strength at every layer, by component.
    """

    views: tuple[LayerView, ...]
    best: int
    trial: int | None
    strengths: dict[str, tuple[float, ...]]


def analyse_residuals(
    directory: RunDirectory, trial: Trial | None, progress: Progress
) -> ResidualAnalysis:
    """Compute views of a run's residuals after each block.

    Args:
        directory: The run's.
        trial: The trial whose strengths are shown; the knee of the frontier if None.
        progress: Display of stages and steps.

    Raises:
        RunDirectoryError: the run holds no residuals, or they are damaged.
    """
    with progress.stage("reading residuals"):
        behaviour, neutral = stored_sets(directory)
    layers = []
    with progress.stage("projections"):
        for view in view_layers(behaviour, neutral, directory.read_recipe().direction):
            layers.append(view)
            progress.step(len(layers), behaviour.layers)
    rows = [{"layer": v.layer, **v.measures} if v.held_out else None for v in layers]
    best = int(best_row(rows)["layer"]) if any(rows) else 0
    if trial is None and (frontier := Frontier.of(directory.trials())):
        trial = frontier.knee
    strengths = (
        {name: profile.strengths(len(layers)) for name, profile in trial.plan.profiles}
        if trial
        else {}
    )
    return ResidualAnalysis(tuple(layers), best, trial.number if trial else None, strengths)
