"""What `directions` and `residuals` make of a run's residuals, without Ray and without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from ray_abliterate.directions.comparison.compare import MethodComparison, best_row, compare_methods
from ray_abliterate.directions.compute import refuse_unknown_methods
from ray_abliterate.directions.layer_views import LayerView, view_layers
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
    """What to compare, by name: what is named, or the package's methods and the recipe's own.

    The recipe's own keeps its options; all share what the recipe says about sparing.

    Raises:
        RecipeError: there is no such method.
        ScoreError: a method's module cannot be imported.
    """
    found = {}
    own = settings.method
    for name in names or (*METHODS, *(() if own in METHODS else (own,))):
        same = name == own
        change = {} if same else {"method": name, "options": {}, "ensemble": ()}
        try:
            found[name] = DirectionSettings.model_validate(settings.model_dump() | change)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"--method {name}: {reason}") from None
        refuse_unknown_methods(found[name])
    return found


def compare_run(
    directory: RunDirectory,
    methods: dict[str, DirectionSettings],
    pairs: int,
    progress: Progress,
) -> MethodComparison:
    """Compare methods on the residuals of a run.

    Raises:
        RunDirectoryError: the run holds no residuals.
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
    """What `residuals` shows.

    Attributes:
        views: A view a layer.
        best: The layer that separates best.
        trial: Whose strengths are shown beside; None if the run has none.
        strengths: By component, for every layer.
    """

    views: tuple[LayerView, ...]
    best: int
    trial: int | None
    strengths: dict[str, tuple[float, ...]]


def analyse_residuals(
    directory: RunDirectory, trial: Trial | None, progress: Progress
) -> ResidualAnalysis:
    """What a run's residuals look like; without a trial, the knee of its frontier stands beside.

    Raises:
        RunDirectoryError: the run holds no residuals.
    """
    with progress.stage("reading residuals"):
        behaviour, neutral = stored_sets(directory)
    found = []
    with progress.stage("projections"):
        for one in view_layers(behaviour, neutral, directory.read_recipe().direction):
            found.append(one)
            progress.step(len(found), behaviour.layers)
    rows = [{"layer": v.layer, **v.measures} if v.held_out else None for v in found]
    best = int(best_row(rows)["layer"]) if any(rows) else 0
    if trial is None and (frontier := Frontier.of(directory.trials())):
        trial = frontier.knee
    strengths = (
        {name: profile.strengths(len(found)) for name, profile in trial.plan.profiles}
        if trial
        else {}
    )
    return ResidualAnalysis(tuple(found), best, trial.number if trial else None, strengths)
