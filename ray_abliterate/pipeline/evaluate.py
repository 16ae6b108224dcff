"""Suites and long texts on request: on the models of a run, or on any model.

All replicas that the machine or the cluster has room for take part.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.connection import connect, is_own_cluster
from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import EvaluationChanged, RecipeError, RunDirectoryError
from ray_abliterate.evaluation.streaming.reader import TextRequest
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.model.source import resolve_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.event_recorder import EventRecorder
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.replicas import start_replicas
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.pipeline.suite_results import BASE, SuiteResults
from ray_abliterate.pipeline.suite_runner import (
    BASE_MODEL,
    MeasuredModel,
    SuiteRunner,
    measure_trials,
)
from ray_abliterate.pipeline.text_evaluation import TextEvaluation, TextResults
from ray_abliterate.recipe import ModelSettings, SuiteSettings
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan

MODEL = "model"
"""Label of a model that belongs to no run; one that it is compared with is labelled as its base."""
NEEDS_A_RUN = ("kl",)
"""Kinds of suites that compare a trial with its own base model."""


@dataclass(frozen=True)
class Models:
    """A model that belongs to no run, and perhaps another one to compare it with.

    Attributes:
        name: Hub name or folder of the model.
        other: Hub name or folder of the model to compare it with.
    """

    name: str
    other: str | None = None

    def labelled(self) -> tuple[tuple[str, str], ...]:
        """Return label and name of each; the one to compare with comes first."""
        first = () if self.other is None else ((BASE, self.other),)
        return (*first, (MODEL, self.name))

    def sources(self, progress: Progress) -> list[tuple[str, str, str]]:
        """Return label, name and source of each; call it before anything is started.

        Raises:
            ModelError: a model can't be found.
        """
        options = {BASE: "--compare", MODEL: "MODEL"}
        shared = not is_own_cluster()
        with progress.stage("model"):
            return [
                (label, name, resolve_model(name, progress.note, shared, options[label]))
                for label, name in self.labelled()
            ]


# A run's models


def evaluate_run(
    directory: RunDirectory,
    trials: Sequence[Trial],
    settings: Sequence[SuiteSettings],
    base: Path,
    progress: Progress,
) -> None:
    """Measure the base model and trials of a run with suites, on all replicas.

    Chunks that are stored are not measured again.

    Args:
        directory: The run's.
        trials: Finished trials; the base model is always measured.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        progress: Display of stages, steps and notes.

    Raises:
        RunDirectoryError: the run has no directions yet.
        RayAbliterateError: a suite can't be measured; what was measured before stays stored.
    """
    with _run_replicas(directory, progress) as (context, shared_setup):
        measure_trials(context, trials, settings, base, shared_setup)


def read_with_run(
    directory: RunDirectory,
    trials: Sequence[Trial],
    request: TextRequest,
    to: Path,
    progress: Progress,
) -> TextResults:
    """Have the base model of a run, and trials, read a text.

    Args:
        directory: The run's.
        trials: Finished trials; the base model always reads.
        request: The text, and how it is to be read.
        to: Folder for the results.
        progress: Display of stages, steps and notes.

    Raises:
        RunDirectoryError: the run has no directions yet.
        EvaluationChanged: the folder holds results of another request, text or base model.
        RayAbliterateError: the text can't be read; chunks that were read stay stored.
    """
    with _run_replicas(directory, progress) as (context, shared_setup):
        models = (BASE_MODEL, *map(MeasuredModel.of, trials))
        name, weights = directory.read_recipe().model.name, context.pool.facts.fingerprint
        evaluation = TextEvaluation(context.pool, shared_setup, to, progress)
        return evaluation.read(request, models, {"name": name, "weights": weights})


@contextmanager
def _run_replicas(
    directory: RunDirectory, progress: Progress
) -> Iterator[tuple[RunContext, Reference[TrialSetup]]]:
    """Start replicas of a run without its scorers; yields them, and a reference to its setup."""
    recipe, directions = directory.read_recipe(), directory.directions()
    if directions is None:
        raise RunDirectoryError(
            f"{directory.path} has no directions yet.\n"
            f"  Go on with:  ray-abliterate resume {directory.path}"
        )
    # No search takes place, so that no replicas are set aside for an evaluation beside it.
    evaluation = recipe.evaluation.model_copy(update={"replicas": 0})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    prefix = tuple(directory.read_environment()["response_prefix"])
    setup = TrialSetup(directions, prefix, directory.tuning())
    with ExitStack() as stack:
        stack.enter_context(directory.locked())
        record = EventRecorder(directory, progress)
        stack.enter_context(record.writer)
        base = directory.read_base()
        context = stack.enter_context(start_replicas(recipe, directory, base, {}, record, progress))
        yield context, context.pool.put(setup)


# Any model


def evaluate_models(
    models: Models, settings: Sequence[SuiteSettings], base: Path, to: Path, progress: Progress
) -> SuiteResults:
    """Measure a model that belongs to no run, and perhaps another one, on all replicas.

    Chunks that are stored are not measured again.

    Args:
        models: The models.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        to: Folder for the results.
        progress: Display of stages, steps and notes.

    Raises:
        RecipeError: a suite needs a run.
        ModelError: a model can't be found or loaded.
        EvaluationChanged: the folder holds results of other models.
        RayAbliterateError: a suite can't be measured; what was measured before stays stored.
    """
    for setting in settings:
        if setting.kind in NEEDS_A_RUN:
            raise RecipeError(
                f"suite {setting.name!r}: {setting.kind} compares a trial with its base model.\n"
                "  Give a run directory, or choose other suites with --suite."
            )
    suites, results = build_suites(settings, base), SuiteResults(to, settings)
    for label, name, source in models.sources(progress):
        with _unedited_replicas(name, source, label, to, progress) as pool:
            runner = SuiteRunner(pool, None, results, progress)
            runner.measure(MeasuredModel(label, Plan.nothing()), suites, settings)
    return results


def read_with_models(
    models: Models, request: TextRequest, to: Path, progress: Progress
) -> TextResults:
    """Have a model that belongs to no run, and perhaps another one, read a text.

    Args:
        models: The models.
        request: The text, and how it is to be read.
        to: Folder for the results.
        progress: Display of stages, steps and notes.

    Raises:
        ModelError: a model can't be found or loaded.
        EvaluationChanged: the folder holds results of other models, or of another text.
        RayAbliterateError: the text can't be read; chunks that were read stay stored.
    """
    texts = []
    for label, name, source in models.sources(progress):
        with _unedited_replicas(name, source, label, to, progress) as pool:
            base = {"name": name, "weights": pool.facts.fingerprint}
            evaluation = TextEvaluation(pool, None, to / label, progress)
            texts.append(evaluation.read(request, [MeasuredModel(label, Plan.nothing())], base))
    totals = {name: own for text in texts for name, own in text.totals.items()}
    chunks = {name: own for text in texts for name, own in text.chunks.items()}
    return TextResults(totals, chunks)


@contextmanager
def _unedited_replicas(
    name: str, source: str, label: str, to: Path, progress: Progress
) -> Iterator[ReplicaPool]:
    """Start replicas of a model that belongs to no run, and claim a label of the folder for it."""
    with ExitStack() as stack:
        with progress.stage("replicas"):
            connect(dashboard=False)
            starting = ReplicaPool.unedited(ModelSettings(name=name), source)
            pool = stack.enter_context(starting)
        facts = pool.facts
        progress.note(f"{name}: {facts.parameters / 1e6:,.0f} M parameters in {facts.dtype}")
        _claim_label(to, label, name, facts.fingerprint)
        yield pool


def _claim_label(to: Path, label: str, name: str, fingerprint: str) -> None:
    """Record which model's results a label of the folder holds.

    Raises:
        EvaluationChanged: they are another model's.
    """
    file = to / "models.json"
    claims = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    model = {"name": name, "weights": fingerprint}
    if claims.get(label, model)["weights"] != fingerprint:
        raise EvaluationChanged(
            f"{to} holds results of {claims[label]['name']} as {label!r}, whose weights are not "
            f"those of {name}.\n  Choose another folder with --to, or remove this one."
        )
    to.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps({**claims, label: model}, indent=2) + "\n").encode())


# What is left behind


def save_suite_scores(results: SuiteResults, suites: Sequence[Suite], to: Path) -> Path:
    """Write every score of every model, and its difference from the base model, as JSON.

    Returns:
        The file, `results.json` in the folder `to`.
    """
    values: dict[str, Any] = {}
    for model in results.labels:
        for suite in suites:
            stored = results.of(model, suite.name)
            if not stored.chunks:
                continue
            finding = results.finding(model, suite)
            difference = finding.comparison if finding else None
            values.setdefault(model, {})[suite.name] = {
                "whole": stored.whole,
                "scores": [score.to_dict() for score in suite.summary(stored.chunks)],
                "difference": difference.to_dict() if difference else None,
            }
    file = to / "results.json"
    write_atomically(file, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    return file
