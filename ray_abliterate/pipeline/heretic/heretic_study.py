"""Reads a study journal of Heretic (1.4, or master in July 2026), and says what of it is ours.

Heretic keeps its studies in Optuna's journal files: its settings as an attribute of the study, a
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
"""Of a component's parameters; `min_weight` is a share of `max_weight` there, as our floor is."""
DATASET_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)
"""Of a data set on the Hub; some have no owner."""
NORMS = {"none": "none", "full": "row"}
SCORERS = {"KeywordRate": "keyword-rate", "KLDivergence": "kl-divergence"}
PROMPTS = {
    "KeywordRate": {"dataset": "mlabonne/harmful_behaviors", "split": "test[:100]"},
    "KLDivergence": {"dataset": "mlabonne/harmless_alpaca", "split": "test[:100]"},
}
"""What master scores on where its settings don't say."""

Bounds = tuple[float, float]


@dataclass(frozen=True)
class ForeignTrial:
    """A finished trial of Heretic's.

    Attributes:
        index: The number that Heretic shows.
        params: As Optuna has them.
        scores: What Heretic found, as it shows it.
        losses: The values it compared, smaller is better.
    """

    index: int
    params: Mapping[str, Any]
    scores: Mapping[str, str]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class HereticStudy:
    """A study.

    Attributes:
        settings: Heretic's settings, as it keeps them.
        trials: Those that finished: the Pareto front first, then the others, each in order.
        front: How many of them are on the front.
        unfinished: How many were broken off or failed.
        bounds: Range of each real parameter.
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
        """Which Heretic wrote it."""
        return "master" if "scorers" in self.settings else "1.4"

    @property
    def last_layer(self) -> int:
        """Index of the model's last block: where a peak can lie at most."""
        high = self.bounds[f"{self.components[0]}.max_weight_position"][1]
        return round(high)


def read_study(journal: Path) -> HereticStudy:
    """The study in a journal, which is left as it is; a torn last line is skipped.

    Raises:
        ForeignStudyError: it is no journal of Heretic's, or has no finished trial.
    """
    from optuna.trial import TrialState

    study, trials = _open(journal)
    if "settings" not in study.user_attrs:
        raise ForeignStudyError(
            f"{journal} holds the study {study.study_name!r}, which has no settings of Heretic's.\n"
            "  Heretic keeps its studies in checkpoints/MODEL.jsonl."
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
    known = next(t for t in trials if t.state == TrialState.COMPLETE)
    bounds = {n: (d.low, d.high) for n, d in known.distributions.items() if hasattr(d, "low")}
    components = sorted({n.rpartition(".")[0] for n in bounds if n.endswith(f".{FIELDS[0]}")})
    wanted = {"direction_index", *(f"{c}.{field}" for c in components for field in FIELDS)}
    strange = sorted(wanted ^ set(bounds))
    if not components or strange:
        raise ForeignStudyError(
            f"{journal} has other parameters than Heretic 1.4 and its master branch: "
            f"{', '.join(strange) or 'no component'}.\n"
            "  Other branches search for something else than directions and strengths."
        )
    order, front = _front_first(done)
    unfinished = len(trials) - len(done)
    return HereticStudy(settings, order, front, unfinished, bounds, tuple(components))


def _open(journal: Path) -> tuple[Any, list[Any]]:
    """The study in a file, and its trials."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not journal.is_file():
        raise ForeignStudyError(f"{journal} is not there; Heretic writes checkpoints/MODEL.jsonl.")
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
    known = frozen.user_attrs
    index = int(known["index"])
    if "scorers" not in settings:
        rate, kl = int(known["refusals"]), float(known["kl_divergence"])
        scores = {"refusals": f"{rate}/{known['n_bad_prompts']}", "KL divergence": f"{kl:.4g}"}
        return ForeignTrial(index, frozen.params, scores, (float(rate), kl))
    goals = [str(scorer["optimization"]) for scorer in settings["scorers"]]
    records = known["scores"]
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
    """The recipe of a study, without its search space.

    Args:
        study: The study.
        model: Where the model is, if not where the study says.

    Raises:
        ForeignStudyError: a setting has no counterpart; says which.
    """
    known = study.settings
    norm = str(known.get("row_normalization", "full"))
    if norm not in NORMS:
        raise ForeignStudyError(
            f'row_normalization = "{norm}" has no counterpart here: its edits are relative to '
            "normalised rows.\n"
            '  Studies with "full" (norm = "row") and "none" can be taken over.'
        )
    quantile = float(known.get("winsorization_quantile", 1.0))
    if not 0.5 < quantile <= 1:
        raise ForeignStudyError(f"winsorization_quantile = {quantile} is not between 0.5 and 1.")
    dtypes = get_args(ModelSettings.model_fields["dtype"].annotation)
    dtype = next((d for d in known.get("dtypes", ()) if d in dtypes), "auto")
    revision = None if model else known.get("model_commit")
    return {
        "model": _set(name=model or known["model"], revision=revision, dtype=dtype),
        "prompts": {
            "behaviour": _source(known, known["bad_prompts"], "bad_prompts"),
            "neutral": _source(known, known["good_prompts"], "good_prompts"),
        },
        "direction": {
            "project_out_neutral": bool(known.get("orthogonalize_direction", True)),
            "winsorize_quantile": quantile,
            "skip_common_prefix": bool(known.get("response_prefix")),
        },
        "edit": {"norm": NORMS[norm]},
        "search": {
            "trials": len(study.trials),
            "startup_trials": int(known.get("n_startup_trials", 60)),
            "seed": int(known.get("seed") or 0),
            "seeds": "none",
        },
        "scorers": list(_scorers(known)),
        "run": _set(batch_size=known.get("batch_size") or None),
    }


def _scorers(known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    tokens = int(known.get("max_response_length", 100))
    if "scorers" not in known:
        rate, kl = known["bad_evaluation_prompts"], known["good_evaluation_prompts"]
        yield {
            "kind": "keyword-rate",
            "prompts": _source(known, rate, "bad_evaluation_prompts"),
            "markers": list(known["refusal_markers"]),
            "max_new_tokens": tokens,
        }
        prompts = _source(known, kl, "good_evaluation_prompts")
        yield {"kind": "kl-divergence", "prompts": prompts}
        return
    for scorer in known["scorers"]:
        name = str(scorer["plugin"]).rpartition(".")[2]
        if name not in SCORERS or scorer.get("instance_name"):
            raise ForeignStudyError(
                f"the scorer {scorer['plugin']} {scorer.get('instance_name') or ''} has no "
                f"counterpart here; known are {' and '.join(SCORERS)}, once each."
            )
        own = known.get("scorer", {}).get(name, {})
        prompts = {**PROMPTS[name], "column": "text"} if "prompts" not in own else own["prompts"]
        goal = {"none": "report"}.get(scorer["optimization"], scorer["optimization"])
        found = {"kind": SCORERS[name], "goal": goal, "prompts": _source(known, prompts, name)}
        if name == "KeywordRate":
            found["max_new_tokens"] = tokens
            found["markers"] = own.get("keyword_markers", "broad")
        yield found


def _source(known: Mapping[str, Any], given: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """A prompt set; Heretic puts a blank between prefix, prompt and suffix."""
    place, split = str(given["dataset"]), given.get("split") or ""
    if not SPLIT.match(split):
        raise ForeignStudyError(f'{setting}: split = "{split}" has no counterpart; write `[:400]`.')
    prefix, suffix = given.get("prefix") or "", given.get("suffix") or ""
    system = given.get("system_prompt")
    return {
        **_place(place, setting),
        **_set(
            split=split or None,
            column=None if Path(place).is_file() else given.get("column"),
            revision=given.get("commit"),
            prefix=f"{prefix} " if prefix else None,
            suffix=f" {suffix}" if suffix else None,
            system=known.get("system_prompt") if system is None else system,
        ),
        "deduplicate": False,
    }


def _place(place: str, setting: str) -> dict[str, str]:
    path = Path(place)
    if path.is_file():
        if path.suffix != ".txt":
            raise ForeignStudyError(
                f"{setting}: Heretic reads {place} line by line; give a copy of it the ending .txt."
            )
        return {"file": place}
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise ForeignStudyError(
                f"{setting}: {place} was not saved by `datasets` (save_to_disk); save it so."
            )
        return {"folder": place}
    if DATASET_NAME.fullmatch(place) and path.suffix not in (".txt", ".json", ".csv", ".parquet"):
        return {"dataset": place}
    raise ForeignStudyError(
        f"{setting}: {place} is not there (from {Path.cwd()}).\n"
        "  Give the command in the folder where Heretic was run."
    )


def _set(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
