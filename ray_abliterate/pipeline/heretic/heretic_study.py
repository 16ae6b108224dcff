"""Reads a study journal of Heretic (1.4, or master in July 2026), and translates its settings.

Heretic stores its studies in Optuna's journal files: its settings as an attribute of the study, a
trial's parameters as Optuna's, its scores as attributes. Only names and values are read, nothing is
run. What has no exact counterpart is refused, or noted where it changes scores and not plans.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ray_abliterate.errors import ForeignStudyError
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.recipe.sources import SPLIT
from ray_abliterate.search.frontier import weakly_dominates

STUDY_NAME = "heretic"
FIELDS = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
"""Parameters of a component; `min_weight` is a share of `max_weight` there, as our floor is."""
DATASET_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)
"""Name of a data set on the Hub; some have no owner."""
NORMS = {"none": "none", "full": "row"}
SCORERS = {"KeywordRate": "keyword-rate", "KLDivergence": "kl-divergence"}
PROMPTS = {
    "KeywordRate": {"dataset": "mlabonne/harmful_behaviors", "split": "test[:100]"},
    "KLDivergence": {"dataset": "mlabonne/harmless_alpaca", "split": "test[:100]"},
}
"""Prompts that master scores on where its settings name none."""

Bounds = tuple[float, float]


@dataclass(frozen=True)
class ForeignTrial:
    """A finished trial of Heretic's.

    Attributes:
        index: The number that Heretic shows.
        params: The parameters, under Heretic's names.
        scores: The scores as Heretic shows them, by name.
        losses: The objectives that it compared, smaller is better.
    """

    index: int
    params: Mapping[str, Any]
    scores: Mapping[str, str]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class HereticStudy:
    """A study of Heretic's.

    Attributes:
        settings: Heretic's settings, under its names.
        trials: Those that finished: the Pareto front first, then the others, each in order.
        front: How many of them are on the front.
        unfinished: How many were interrupted or failed.
        bounds: Range of each real parameter, by name.
        components: Names of its components.
    """

    settings: Mapping[str, Any]
    trials: tuple[ForeignTrial, ...]
    front: int
    unfinished: int
    bounds: Mapping[str, Bounds]
    components: tuple[str, ...]

    @property
    def version(self) -> str:
        """The version of Heretic that wrote the study: `1.4` or `master`."""
        return "master" if "scorers" in self.settings else "1.4"

    @property
    def last_layer(self) -> int:
        """Index of the model's last block, the highest that a peak can lie at."""
        high = self.bounds[f"{self.components[0]}.max_weight_position"][1]
        return round(high)


def read_study(journal: Path) -> HereticStudy:
    """Read the study in a journal, which is left as it is; a torn last line is skipped.

    Raises:
        ForeignStudyError: it is not a journal of Heretic's, or has no finished trial.
    """
    from optuna.trial import TrialState

    study, trials = _open(journal)
    if "settings" not in study.user_attrs:
        raise ForeignStudyError(
            f"{journal} holds the study {study.study_name!r}, which has no settings of Heretic's.\n"
            "  Heretic writes its studies to checkpoints/MODEL.jsonl."
        )
    try:
        settings = json.loads(study.user_attrs["settings"])
        done = [_trial(t, settings) for t in trials if t.state == TrialState.COMPLETE]
    except (ValueError, KeyError, TypeError) as error:
        raise ForeignStudyError(
            f"{journal} is not as Heretic 1.4 or its master branch writes it: {error!r}"
        ) from None
    if not done:
        raise ForeignStudyError(f"{journal} has no finished trial.")
    first = next(t for t in trials if t.state == TrialState.COMPLETE)
    bounds = {n: (d.low, d.high) for n, d in first.distributions.items() if hasattr(d, "low")}
    components = sorted({n.rpartition(".")[0] for n in bounds if n.endswith(f".{FIELDS[0]}")})
    wanted = {"direction_index", *(f"{c}.{field}" for c in components for field in FIELDS)}
    strange = sorted(wanted ^ set(bounds))
    if not components or strange:
        raise ForeignStudyError(
            f"{journal} has other parameters than Heretic 1.4 and its master branch: "
            f"{', '.join(strange) or 'no component'}.\n"
            "  Other branches search over something other than directions and strengths."
        )
    order, front = _front_first(done)
    unfinished = len(trials) - len(done)
    return HereticStudy(settings, order, front, unfinished, bounds, tuple(components))


def _open(journal: Path) -> tuple[Any, list[Any]]:
    """Return Optuna's study in a file, and its trials."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not journal.is_file():
        raise ForeignStudyError(
            f"{journal} does not exist; Heretic writes its studies to checkpoints/MODEL.jsonl."
        )
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        studies = storage.get_all_studies()
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ForeignStudyError(f"{journal} can't be read as a journal: {error!r}") from None
    named = [study for study in studies if study.study_name == STUDY_NAME] or studies
    if len(named) != 1:
        raise ForeignStudyError(f"{journal} holds {len(named)} studies, and should hold one.")
    return named[0], storage.get_all_trials(named[0]._study_id)


def _trial(frozen: Any, settings: Mapping[str, Any]) -> ForeignTrial:
    attributes = frozen.user_attrs
    index = int(attributes["index"])
    if "scorers" not in settings:
        rate, kl = int(attributes["refusals"]), float(attributes["kl_divergence"])
        scores = {"refusals": f"{rate}/{attributes['n_bad_prompts']}", "KL divergence": f"{kl:.4g}"}
        return ForeignTrial(index, frozen.params, scores, (float(rate), kl))
    goals = [str(scorer["optimization"]) for scorer in settings["scorers"]]
    records = attributes["scores"]
    signs = {"minimize": 1.0, "maximize": -1.0}
    losses = tuple(
        signs[goal] * float(record["score"]["value"])
        for goal, record in zip(goals, records, strict=True)
        if goal in signs
    )
    scores = {str(r["name"]): str(r["score"]["rich_display"]) for r in records}
    return ForeignTrial(index, frozen.params, scores, losses)


def _front_first(trials: Sequence[ForeignTrial]) -> tuple[tuple[ForeignTrial, ...], int]:
    front: list[ForeignTrial] = []
    for trial in sorted(trials, key=lambda t: (t.losses, t.index)):
        if not any(weakly_dominates(member.losses, trial.losses) for member in front):
            front.append(trial)
    front.sort(key=lambda t: t.index)
    rest = sorted((t for t in trials if t not in front), key=lambda t: t.index)
    return (*front, *rest), len(front)


# Settings


def recipe_values(study: HereticStudy, model: str | None) -> dict[str, Any]:
    """Return the recipe's values of a study, without its search space.

    Args:
        study: The study.
        model: Folder or Hub name of the model, if not the one that the study names.

    Raises:
        ForeignStudyError: a setting has no counterpart; the message names it.
    """
    settings = study.settings
    norm = str(settings.get("row_normalization", "full"))
    if norm not in NORMS:
        raise ForeignStudyError(
            f'row_normalization = "{norm}" has no counterpart here: its edits are relative to '
            "normalised rows.\n"
            '  Studies with "full" (norm = "row") and "none" can be imported.'
        )
    quantile = float(settings.get("winsorization_quantile", 1.0))
    if not 0.5 < quantile <= 1:
        raise ForeignStudyError(f"winsorization_quantile = {quantile} is not between 0.5 and 1.")
    dtypes = get_args(ModelSettings.model_fields["dtype"].annotation)
    dtype = next((d for d in settings.get("dtypes", ()) if d in dtypes), "auto")
    revision = None if model else settings.get("model_commit")
    return {
        "model": _given(name=model or settings["model"], revision=revision, dtype=dtype),
        "prompts": {
            "behaviour": _source(settings, settings["bad_prompts"], "bad_prompts"),
            "neutral": _source(settings, settings["good_prompts"], "good_prompts"),
        },
        "direction": {
            "project_out_neutral": bool(settings.get("orthogonalize_direction", True)),
            "winsorize_quantile": quantile,
            "skip_common_prefix": bool(settings.get("response_prefix")),
        },
        "edit": {"norm": NORMS[norm]},
        "search": {
            "trials": len(study.trials),
            "startup_trials": int(settings.get("n_startup_trials", 60)),
            "seed": int(settings.get("seed") or 0),
            "seeds": "none",
        },
        "scorers": list(_scorers(settings)),
        "run": _given(batch_size=settings.get("batch_size") or None),
    }


def _scorers(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    tokens = int(settings.get("max_response_length", 100))
    if "scorers" not in settings:
        rate, kl = settings["bad_evaluation_prompts"], settings["good_evaluation_prompts"]
        yield {
            "kind": "keyword-rate",
            "prompts": _source(settings, rate, "bad_evaluation_prompts"),
            "markers": list(settings["refusal_markers"]),
            "max_new_tokens": tokens,
        }
        prompts = _source(settings, kl, "good_evaluation_prompts")
        yield {"kind": "kl-divergence", "prompts": prompts}
        return
    for scorer in settings["scorers"]:
        name = str(scorer["plugin"]).rpartition(".")[2]
        if name not in SCORERS or scorer.get("instance_name"):
            raise ForeignStudyError(
                f"the scorer {scorer['plugin']} {scorer.get('instance_name') or ''} has no "
                f"counterpart here; known are {' and '.join(SCORERS)}, once each."
            )
        own = settings.get("scorer", {}).get(name, {})
        prompts = {**PROMPTS[name], "column": "text"} if "prompts" not in own else own["prompts"]
        goal = {"none": "report"}.get(scorer["optimization"], scorer["optimization"])
        values = {"kind": SCORERS[name], "goal": goal, "prompts": _source(settings, prompts, name)}
        if name == "KeywordRate":
            values["max_new_tokens"] = tokens
            values["markers"] = own.get("keyword_markers", "broad")
        yield values


def _source(settings: Mapping[str, Any], given: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the source of a prompt set; Heretic joins prefix, prompt and suffix with blanks."""
    place, split = str(given["dataset"]), given.get("split") or ""
    if not SPLIT.match(split):
        raise ForeignStudyError(f'{setting}: split = "{split}" has no counterpart; write `[:400]`.')
    prefix, suffix = given.get("prefix") or "", given.get("suffix") or ""
    system = given.get("system_prompt")
    return {
        **_place(place, setting),
        **_given(
            split=split or None,
            column=None if Path(place).is_file() else given.get("column"),
            revision=given.get("commit"),
            prefix=f"{prefix} " if prefix else None,
            suffix=f" {suffix}" if suffix else None,
            system=settings.get("system_prompt") if system is None else system,
        ),
        "deduplicate": False,
    }


def _place(place: str, setting: str) -> dict[str, str]:
    path = Path(place)
    if path.is_file():
        if path.suffix != ".txt":
            raise ForeignStudyError(
                f"{setting}: Heretic reads {place} line by line; give it a name in .txt."
            )
        return {"file": place}
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise ForeignStudyError(
                f"{setting}: {place} was not saved by `datasets`; save it with save_to_disk."
            )
        return {"folder": place}
    if DATASET_NAME.fullmatch(place) and path.suffix not in (".txt", ".json", ".csv", ".parquet"):
        return {"dataset": place}
    raise ForeignStudyError(
        f"{setting}: {place} does not exist (looked for in {Path.cwd()}).\n"
        "  Run the command in the folder where Heretic was run."
    )


def _given(**values: Any) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {name: value for name, value in values.items() if value is not None}
