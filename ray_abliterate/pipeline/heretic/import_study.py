"""Makes a run of a Heretic study: its recipe, and its trials as plans that wait to be evaluated.

Heretic's scores are not taken for ours: its row-preserving edit is a low-rank approximation of
ours, and its answers are judged otherwise. They are stored with the run (`show` prints them), and
`resume` scores the plans anew, in parallel: those of Heretic's Pareto front first, so that others
can be stopped early.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.errors import ForeignStudyError, ModelError
from ray_abliterate.model.architecture import Writer, find_writers, hidden_size, text_config
from ray_abliterate.model.skeleton import build_skeleton
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.heretic.heretic_study import (
    ForeignTrial,
    HereticStudy,
    read_study,
    recipe_values,
)
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import Recipe
from ray_abliterate.recipe.toml_writer import to_toml
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.space import SearchSpace

EDITED = {
    "attn.o_proj": r"(self_attn\.(o_proj|out_proj)|linear_attn\.out_proj|conv\.out_proj)",
    "mlp.down_proj": r"(mlp\.down_proj|mlp\.experts\.\d+\.down_proj"
    r"|(block_sparse_moe|feed_forward)\.experts\.\d+\.w2|feed_forward\.w2"
    r"|shared_mlp\.output_linear|moe\.experts\.\d+\.output_linear)",
}
"""Regexes for the ends of the names of the matrices that Heretic edits, by its component."""
OFF = (-0.25, 1.5)
"""Range of the peak of a component that Heretic does not edit; below 0 the strength is 0."""


@dataclass(frozen=True)
class ImportedStudy:
    """A run that was made of a study.

    Attributes:
        directory: The run directory, whose plans wait to be evaluated.
        study: The study.
        trials: The trials that were imported, in the order of their new numbers.
        notes: Why scores may differ from Heretic's though the plans are equal.
    """

    directory: RunDirectory
    study: HereticStudy
    trials: tuple[ForeignTrial, ...]
    notes: tuple[str, ...]


def import_study(
    journal: Path, to: Path, progress: Progress, model: str | None = None, front_only: bool = False
) -> ImportedStudy:
    """Make a run directory from a study's journal, which is left as it is.

    Args:
        journal: Heretic's `checkpoints/MODEL.jsonl`.
        to: The run directory, which must not hold a run yet.
        progress: Display of stages.
        model: Folder or Hub name of the model, if not what the journal says.
        front_only: Import only the trials of Heretic's Pareto front.

    Raises:
        ForeignStudyError: the journal can't be read, or has no exact counterpart here.
        ModelError: the model's configuration can't be read.
        RunExists: the folder holds a run, or other files.
    """
    study = read_study(journal)
    values = recipe_values(study, model)
    with progress.stage("model"):
        shape, writers = _shape(values["model"])
    if study.last_layer != shape.layers - 1:
        raise ForeignStudyError(
            f"the study is of a model with {study.last_layer + 1} layers, but "
            f"{values['model']['name']} has {shape.layers}.\n  Name the right one with --model."
        )
    sources = matching_components(writers, study.components)
    trials = study.trials[: study.front] if front_only else study.trials
    values["search"] |= {"trials": len(trials), "space": space_values(study, sources)}
    notes = tuple(_notes(study, values, writers, sources))
    text = f"# Made of {journal.name}, a study of Heretic {study.version}.\n" + to_toml(values)
    recipe = Recipe.parse(text, "recipe.toml")
    plans = [params_of(trial, sources, shape.layers - 1) for trial in trials]
    directory = RunDirectory.create(to, recipe, text)
    directory.record_facts(base=str(Path.cwd()), base_given=".")
    _enqueue(directory, recipe, shape, trials, plans)
    directory.save_imported_study(
        {
            "tool": f"Heretic {study.version}",
            "notes": notes,
            "trials": [
                {"number": n, "index": t.index, "scores": dict(t.scores)}
                for n, t in enumerate(trials)
            ],
        }
    )
    return ImportedStudy(directory, study, trials, notes)


# Components and plans


def matching_components(writers: Sequence[Writer], theirs: Sequence[str]) -> dict[str, str | None]:
    """Return for each of our components the one of Heretic's that edits the same matrices.

    None where Heretic edits none of them, such as stacked experts.

    Args:
        writers: Our writers.
        theirs: Components of the study.

    Raises:
        ForeignStudyError: Heretic edits only some of a component's matrices, or edits them as a
            component that isn't in the study.
    """
    matches: dict[str, set[str | None]] = {}
    for writer in writers:
        matches.setdefault(writer.component, set()).add(_theirs(writer.parameter))
    for component, names in matches.items():
        if len(names) > 1 or not names <= {*theirs, None}:
            raise ForeignStudyError(
                f"Heretic doesn't edit the component {component!r} as a whole "
                f"({', '.join(sorted(map(str, names)))}), so its plans have no counterpart here."
            )
    return {component: next(iter(names)) for component, names in sorted(matches.items())}


def _theirs(parameter: str) -> str | None:
    ends = (name for name, end in EDITED.items() if re.search(rf"\.{end}\.weight$", parameter))
    return next(ends, None)


def params_of(
    trial: ForeignTrial, sources: Mapping[str, str | None], last: int
) -> dict[str, float | str]:
    """Return a trial's parameters under our names; the values mean the same in both tools.

    Args:
        trial: Heretic's trial.
        sources: Heretic's component for each of ours, as `matching_components` gives it.
        last: Index of the last layer.
    """
    given = trial.params
    params: dict[str, float | str] = {
        "direction_scope": str(given["direction_scope"]).replace(" ", "-"),
        "direction_layer": float(given["direction_index"]),
    }
    for ours, theirs in sources.items():
        if theirs is None:
            profile = {"peak": 0.0, "peak_layer": 0.8 * last, "floor": 0.5, "reach": float(last)}
        else:
            profile = {
                "peak": float(given[f"{theirs}.max_weight"]),
                "peak_layer": float(given[f"{theirs}.max_weight_position"]),
                "floor": float(given[f"{theirs}.min_weight"]),
                "reach": float(given[f"{theirs}.min_weight_distance"]),
            }
        params |= {f"{ours}.{field}": value for field, value in profile.items()}
    return params


def space_values(study: HereticStudy, sources: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the ranges that Heretic searched; layers as shares of the last one's index."""
    last = study.last_layer

    def share(name: str) -> list[float]:
        low, high = study.bounds[name]
        return [round(low / last, 12), round(high / last, 12)]

    space: dict[str, Any] = {"direction_layer": share("direction_index"), "components": {}}
    for ours, theirs in sources.items():
        if theirs is None:
            ranges = {"peak": list(OFF), "peak_layer": [0.6, 1.0], "reach": [0.0, 1.0]}
        else:
            ranges = {
                "peak": list(study.bounds[f"{theirs}.max_weight"]),
                "peak_layer": share(f"{theirs}.max_weight_position"),
                "floor": list(study.bounds[f"{theirs}.min_weight"]),
                "reach": share(f"{theirs}.min_weight_distance"),
            }
        space["components"][ours] = ranges
    return space


def _enqueue(
    directory: RunDirectory,
    recipe: Recipe,
    shape: ModelShape,
    trials: Sequence[ForeignTrial],
    plans: Sequence[dict[str, float | str]],
) -> None:
    """Enqueue the plans in the run's journal, where the search finds those that wait."""
    from ray_abliterate.search.study import open_storage, open_study

    space = SearchSpace.of(shape, recipe.search.space, recipe.edit.norm)
    goals = [scorer.goal for scorer in recipe.scorers if scorer.goal != "report"]
    study = open_study(open_storage(directory.journal), goals)
    for trial, params in zip(trials, plans, strict=True):
        space.plan(params)  # refuses a plan that our space can't hold
        study.enqueue_trial(params, user_attrs={"heretic": trial.index})


# The model, without its weights


def _shape(settings: Mapping[str, Any]) -> tuple[ModelShape, tuple[Writer, ...]]:
    from transformers import AutoConfig

    name, revision = settings["name"], settings.get("revision")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise ModelError(
            f"the configuration of {name} cannot be read.\n  {first}\n"
            "  If the model is somewhere else, say where with --model."
        ) from None
    module = build_skeleton(config)
    writers = find_writers(module, in_memory=False)
    layers = int(text_config(module).num_hidden_layers)
    edited = tuple(sorted({writer.component for writer in writers}))
    return ModelShape(layers, hidden_size(module), edited), writers


def _notes(
    study: HereticStudy,
    values: Mapping[str, Any],
    writers: Sequence[Writer],
    sources: Mapping[str, str | None],
) -> Iterator[str]:
    """Yield the differences for which scores may differ though plans are equal."""
    if values["edit"]["norm"] == "row":
        yield "rows keep their norms exactly here; Heretic approximates that edit at a low rank"
    if study.settings.get("quantization", "none") != "none":
        yield (
            "Heretic searched on 4-bit weights; here they have full precision "
            '(model.quantization = "nf4" for the same)'
        )
    if any(writer.post_norm for writer in writers):
        yield "directions are pulled back through the norm after a writer; Heretic's are not"
    if any(writer.bias for writer in writers):
        yield "biases of edited matrices are edited, too; Heretic leaves them alone"
    yield "the last layer's own direction is taken before the final norm; Heretic's after it"
    left = [component for component, theirs in sources.items() if theirs is None]
    if left:
        yield (
            f"Heretic does not edit {', '.join(left)}, nor do its plans; a longer search may do so"
        )
    if any(scorer.get("markers") == "broad" for scorer in values["scorers"]):
        yield "the journal doesn't hold Heretic's own list of markers; ours is used"
    if len(study.settings.get("dtypes", ())) > 1:
        yield f"the journal doesn't say which dtype was used; taking {values['model']['dtype']}"
