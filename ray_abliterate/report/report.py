"""Build the report: one page of HTML about a run, readable without a network or Python.

Reads a run directory and nothing else. Figures are built in `figures`; the page's own code is
`report/templates/report.js`. Answers of the model are never shown.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_abliterate.directions.layer_selection import TABLE_HEADER
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.export_notes import (
    FULL_PRECISION_FACT,
    full_precision_scores,
    quantization_gaps,
    verified_exports,
)
from ray_abliterate.pipeline.suite_results import BASE, label
from ray_abliterate.recipe import PromptSource
from ray_abliterate.report.figures.frontier import frontier_figure
from ray_abliterate.report.figures.importance import importance_figure
from ray_abliterate.report.figures.layers import members_figure, separation_figures, strength_figure
from ray_abliterate.report.figures.search import progress_figures
from ray_abliterate.report.figures.timeline import timeline_figure
from ray_abliterate.report.figures.validation import validation_figures
from ray_abliterate.report.run_data import RunData, finding_texts, model_text
from ray_abliterate.report.timeline import Timeline
from ray_abliterate.report.trial_sheets import GOALS, choices, headline, sheets
from ray_abliterate.search.bound_warnings import bound_warnings
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.score_text import counts_text, value_text

HIDDEN = ("warnings", "suites", FULL_PRECISION_FACT)
"""Entries of `environment.json` that the page shows elsewhere."""


def write_report(directory: RunDirectory) -> Path:
    """Build the report, write it into the run directory, and return its path."""
    directory.save_report(build_report(directory))
    return directory.report


def build_report(directory: RunDirectory) -> str:
    """Return the report as HTML; a run without trials has one too."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    run = RunData.read(directory)
    figures = {
        "frontier": frontier_figure(run),
        "strengths": strength_figure(run),
        "members": members_figure(run),
        **separation_figures(run.base),
        **validation_figures(run),
        **progress_figures(run),
        "timeline": timeline_figure(Timeline.read(directory)),
    }
    figures["importance"], importance_note = importance_figure(run)
    pages = Environment(
        loader=PackageLoader("ray_abliterate.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("report.html.jinja").render(
        run=run,
        recipe=run.recipe,
        goals=GOALS,
        sets={
            "Prompts with the behaviour": run.recipe.prompts.behaviour,
            "Prompts without it": run.recipe.prompts.neutral,
        },
        source_name=_source_name,
        date=str(run.environment.get("started", ""))[:16].replace("T", " "),
        figures={name: figure for name, figure in figures.items() if figure["views"]},
        importance_note=importance_note,
        headers=run.baseline.scores if run.baseline else run.best[0].scores if run.best else (),
        base_cells=_cells(run.baseline) if run.baseline else [],
        headline=headline(run),
        suites=_suites(run),
        rows=[_row(run, trial, directory.path) for trial in run.frontier.members],
        others=[_row(run, trial, directory.path) for trial in run.trials if trial.scorecard],
        layers_head=TABLE_HEADER,
        choices=choices(run),
        sheets=sheets(run),
        exports=verified_exports(directory),
        rescored=full_precision_scores(run.environment),
        gaps=quantization_gaps(full_precision_scores(run.environment)),
        warnings=[*_bounds(run), *run.environment.get("warnings", []), *run.suites.problems],
        environment=list(_flat({k: v for k, v in run.environment.items() if k not in HIDDEN})),
        plotly=Markup(get_plotlyjs()),
    )


def _suites(run: RunData) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each measured model with its score and difference from the base model, per suite.

    The base model comes first, then the frontier in its order, then what has left it.
    """
    members = [label(trial.number) for trial in run.frontier.members]
    order = [model for model in (BASE, *members) if model in run.suites.findings]
    return [
        (model_text(model), [finding_texts(findings.get(name)) for name in run.suites.names])
        for model in dict.fromkeys([*order, *run.suites.findings])
        for findings in [run.suites.findings[model]]
    ]


def _bounds(run: RunData) -> list[str]:
    return bound_warnings(run.frontier, run.space) if run.space else []


def _source_name(source: PromptSource) -> str:
    name = source.builtin or source.file or source.folder or source.dataset or ""
    return f"{name} {source.split}".rstrip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as pairs of a dotted key and a text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _row(run: RunData, trial: Trial, path: Path) -> dict[str, Any]:
    """Return one row of a table of trials, with the commands that show, export or chat with it."""
    assert trial.scorecard is not None
    run_path, number = shlex.quote(path.as_posix()), trial.number
    commands = [
        f"ray-abliterate show {run_path} --trial {number}",
        f"ray-abliterate export {run_path} --trial {number} --to DIR",
        f"ray-abliterate chat {run_path} --trial {number}",
    ]
    knee = bool(run.frontier) and trial is run.frontier.knee
    cells = _cells(trial.scorecard)
    return {"trial": trial, "knee": knee, "cells": cells, "commands": commands}


def _cells(card: Scorecard) -> list[tuple[str, str, str]]:
    """Return name, value with interval, and counts of each score."""
    return [(score.name, value_text(score), counts_text(score)) for score in card.scores]
