"""Suites and long texts on request: on the models of a run, or on any model.

All replicas that the machine or the cluster has room for take part.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.connection import connect, ours
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.errors import EvaluationChanged, RecipeError, RunDirectoryError
from ray_abliterate.evaluation.streaming.reader import Reading
from ray_abliterate.evaluation.suites.build import build
from ray_abliterate.model.source import model_source
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.pipeline.run import replicas
from ray_abliterate.pipeline.search_stage import Record
from ray_abliterate.pipeline.suite_results import BASE, Measurements
from ray_abliterate.pipeline.suite_runner import BASE_MODEL, Measurer, Subject, measure_trials
from ray_abliterate.pipeline.text_evaluation import Text, read_text, text_page
from ray_abliterate.recipe import ModelSettings, SuiteSettings
from ray_abliterate.replica.replica import Setup
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan

MODEL = "model"
"""Label of a model that is of no run; one that it is compared with has the base model's."""
NEEDS_A_RUN = ("kl",)
"""Suites that compare a trial with its own base model."""


@dataclass(frozen=True)
class Models:
    """What is evaluated, if it is of no run: a model, and perhaps one to compare it with."""

    name: str
    other: str | None = None

    def labelled(self) -> tuple[tuple[str, str], ...]:
        """Label and name of each; the one that is compared with comes first."""
        first = () if self.other is None else ((BASE, self.other),)
        return (*first, (MODEL, self.name))

    def found(self, watch: Watch) -> list[tuple[str, str, str]]:
        """Label, name and source of each; to be asked before anything is started.

        Raises:
            ModelError: one can't be there.
        """
        fields = {BASE: "--compare", MODEL: "MODEL"}
        with watch.stage("model"):
            return [
                (title, name, model_source(name, watch.note, not ours(), fields[title]))
                for title, name in self.labelled()
            ]


# A run's models


def evaluate_run(
    directory: RunDirectory,
    trials: Sequence[Trial],
    settings: Sequence[SuiteSettings],
    base: Path,
    watch: Watch,
) -> None:
    """Measure the base model and trials of a run, on all replicas; what is known is kept.

    Args:
        directory: The run's.
        trials: Beside the base model.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        watch: Is told how far it is.

    Raises:
        RunDirectoryError: the run has no directions yet.
        RayAbliterateError: a suite can't be measured; what was measured before is kept.
    """
    with _pool_of_run(directory, watch) as (pool, shared):
        measure_trials(directory, trials, settings, base, pool, shared, watch)


def read_with_run(
    directory: RunDirectory, trials: Sequence[Trial], reading: Reading, to: Path, watch: Watch
) -> Text:
    """The base model of a run and trials read a text.

    Raises:
        RunDirectoryError: the run has no directions yet.
        RayAbliterateError: the text can't be read so.
    """
    with _pool_of_run(directory, watch) as (pool, shared):
        subjects = (BASE_MODEL, *map(Subject.of, trials))
        model = {"name": directory.recipe.model.name, "weights": pool.facts.fingerprint}
        text = read_text(pool, reading, subjects, shared, model, to, watch)
    return _with_page(text, to)


@contextmanager
def _pool_of_run(directory: RunDirectory, watch: Watch) -> Iterator[tuple[ReplicaPool, Any]]:
    """Replicas of a run, and a reference to its setup."""
    recipe, directions = directory.recipe, directory.directions()
    if directions is None:
        raise RunDirectoryError(
            f"{directory.path} has no directions yet.\n"
            f"  Go on with:  ray-abliterate resume {directory.path}"
        )
    own = recipe.evaluation.model_copy(update={"replicas": 0})  # nothing is searched beside it
    recipe = recipe.model_copy(update={"evaluation": own})
    prefix = tuple(directory.environment["response_prefix"])
    setup = Setup(directions, prefix, directory.tuning())
    with ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(directory.locked())
        record = Record(directory, watch)
        open_until_the_end.enter_context(record.writer)
        starting = replicas(recipe, directory, directory.base, {}, record, watch)
        pool, _ = open_until_the_end.enter_context(starting)
        yield pool, pool.put(setup)


# Any model


def evaluate_models(
    models: Models, settings: Sequence[SuiteSettings], base: Path, to: Path, watch: Watch
) -> Measurements:
    """Measure a model of no run, and perhaps another one, on all replicas; what is known is kept.

    Args:
        models: Which.
        settings: The suites.
        base: Folder that the suites' files are looked up in.
        to: Folder for the results.
        watch: Is told how far it is.

    Raises:
        RecipeError: a suite needs a run.
        ModelError: one of them can't be there.
        EvaluationChanged: the folder holds results of other models.
        RayAbliterateError: a suite can't be measured; what was measured before is kept.
    """
    for setting in settings:
        if setting.kind in NEEDS_A_RUN:
            raise RecipeError(
                f"suite {setting.name!r}: {setting.kind} compares a trial with its base model.\n"
                "  Give a run directory, or choose other suites with --suite."
            )
    suites, kept = build(settings, base), Measurements(to, settings)
    for title, name, source in models.found(watch):
        with _pool_of_model(name, source, title, to, watch) as pool:
            measurer = Measurer(pool, None, kept, watch)
            measurer.model(Subject(title, Plan.nothing()), suites, settings)
    return kept


def read_with_models(models: Models, reading: Reading, to: Path, watch: Watch) -> Text:
    """A model of no run reads a text, and perhaps another one does.

    Raises:
        ModelError: one of them can't be there.
        EvaluationChanged: the folder holds results of other models.
        RayAbliterateError: the text can't be read so.
    """
    texts = []
    for title, name, source in models.found(watch):
        with _pool_of_model(name, source, title, to, watch) as pool:
            model = {"name": name, "weights": pool.facts.fingerprint}
            subjects = (Subject(title, Plan.nothing()),)
            texts.append(read_text(pool, reading, subjects, None, model, to / title, watch))
    totals = {name: own for text in texts for name, own in text.totals.items()}
    chunks = {name: own for text in texts for name, own in text.chunks.items()}
    return _with_page(Text(totals, chunks), to)


@contextmanager
def _pool_of_model(
    name: str, source: str, title: str, to: Path, watch: Watch
) -> Iterator[ReplicaPool]:
    """Replicas of a model; the folder's results of that label are of no other."""
    with ExitStack() as open_until_the_end:
        with watch.stage("replicas"):
            connect(dashboard=False)
            starting = ReplicaPool.bare(ModelSettings(name=name), source)
            pool = open_until_the_end.enter_context(starting)
        facts = pool.facts
        watch.note(f"{name}: {facts.parameters / 1e6:,.0f} M parameters in {facts.dtype}")
        _claim(to, title, name, facts.fingerprint)
        yield pool


def _claim(to: Path, title: str, name: str, fingerprint: str) -> None:
    """Note whose results a label's are.

    Raises:
        EvaluationChanged: they are another model's.
    """
    file = to / "models.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    own = {"name": name, "weights": fingerprint}
    if known.get(title, own)["weights"] != fingerprint:
        raise EvaluationChanged(
            f"{to} holds results of {known[title]['name']} as {title!r}, whose weights are not "
            f"those of {name}.\n  Choose another folder with --to, or remove this one."
        )
    to.mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps({**known, title: own}, indent=2) + "\n").encode())


# What is left behind


def save_findings(kept: Measurements, suites: Sequence[Any], to: Path) -> Path:
    """Every score of every model as JSON, and each model's differences from the base model."""
    found: dict[str, Any] = {}
    for model in kept.labels:
        for suite in suites:
            known = kept.of(model, suite.name)
            if not known.chunks:
                continue
            finding = kept.finding(model, suite)
            compared = finding.comparison if finding else None
            found.setdefault(model, {})[suite.name] = {
                "whole": known.whole,
                "scores": [score.to_dict() for score in suite.summary(known.chunks)],
                "difference": compared.to_dict() if compared else None,
            }
    file = to / "results.json"
    write_whole(file, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    return file


def _with_page(text: Text, to: Path) -> Text:
    write_whole(to / "chunks.html", text_page(text).encode())
    return text
