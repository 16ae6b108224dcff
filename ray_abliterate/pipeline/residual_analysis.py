"""What `directions` and `residuals` make of a run's residuals, without Ray and without a model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.directions.comparison.compare import Comparison, best_row, compare
from ray_abliterate.directions.compute import refuse_unknown
from ray_abliterate.directions.layer_selection import Selection
from ray_abliterate.directions.layer_views import View, astray, views
from ray_abliterate.directions.methods.registry import METHODS
from ray_abliterate.errors import RecipeError, RunDirectoryError, SearchError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.pipeline.stored_residuals import stored_sets
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.report.page import Page
from ray_abliterate.search.frontier import Frontier, Trial


def methods_of(
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
        refuse_unknown(found[name])
    return found


def compare_run(
    directory: RunDirectory,
    methods: dict[str, DirectionSettings],
    pairs: int,
    watch: Watch,
) -> Comparison:
    """Compare methods on the residuals of a run.

    Raises:
        RunDirectoryError: the run holds no residuals.
        SearchError: no method has a direction.
    """
    with watch.stage("reading residuals"):
        behaviour, neutral = stored_sets(directory)
    with watch.stage("comparing methods"):
        try:
            return compare(behaviour, neutral, methods, pairs, step=watch.step)
        except ValueError as error:
            raise SearchError(
                f"no method finds a direction in {directory.path}: {error}.\n"
                "  Check that prompts.behaviour and prompts.neutral are different prompts."
            ) from None


@dataclass(frozen=True)
class Look:
    """What `residuals` shows.

    Attributes:
        views: A view a layer.
        best: The layer that separates best.
        trial: Whose strengths are shown beside; None if the run has none.
        strengths: By component, for every layer.
    """

    views: tuple[View, ...]
    best: int
    trial: int | None
    strengths: dict[str, tuple[float, ...]]


def look(directory: RunDirectory, trial: Trial | None, watch: Watch) -> Look:
    """What a run's residuals look like; without a trial, the knee of its frontier stands beside.

    Raises:
        RunDirectoryError: the run holds no residuals.
    """
    with watch.stage("reading residuals"):
        behaviour, neutral = stored_sets(directory)
    found = []
    with watch.stage("projections"):
        for one in views(behaviour, neutral, directory.recipe.direction):
            found.append(one)
            watch.step(len(found), behaviour.layers)
    rows = [{"layer": v.layer, **v.measures} if v.held_out else None for v in found]
    best = int(best_row(rows)["layer"]) if any(rows) else 0
    if trial is None and (frontier := Frontier.of(directory.trials())):
        trial = frontier.knee
    strengths = (
        {name: profile.strengths(len(found)) for name, profile in trial.plan.profiles}
        if trial
        else {}
    )
    return Look(tuple(found), best, trial.number if trial else None, strengths)


def write_look(found: Look, page: Page, folder: Path) -> Path:
    """Write `residuals.json` and `residuals.html`; says where the page is."""
    facts = {
        "best_layer": found.best,
        "trial": found.trial,
        "strengths": found.strengths,
        "astray": astray(found.views[found.best]),
        "layers": [
            {
                "layer": v.layer,
                **asdict(v.geometry),
                **(v.measures if v.held_out else dict.fromkeys(v.measures)),
                "components_shares": v.components_shares,
                "gap_shares": v.gap_shares,
            }
            for v in found.views
        ],
    }
    return _write(folder, "residuals", facts, page)


def write_comparison(
    found: Comparison, page: Page, folder: Path, selection: Selection | None = None
) -> Path:
    """Write `directions.json` and `directions.html`; says where the page is."""
    tried = {"selection": selection.to_json()} if selection else {}
    return _write(folder, "directions", {**found.to_json(), **tried}, page)


def _write(folder: Path, name: str, facts: object, page: Page) -> Path:
    try:
        write_whole(folder / f"{name}.json", json.dumps(facts, indent=1, allow_nan=False).encode())
        write_whole(folder / f"{name}.html", page.html().encode())
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written ({error.strerror}).\n"
            "  Choose a folder you may write to with --to."
        ) from None
    return folder / f"{name}.html"
