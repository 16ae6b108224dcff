"""The report: one page of HTML about a run, readable without a network and without Python.

Reads a run directory and nothing else. Figures are in `figures.py`. Answers of the model
are never shown.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_abliterate.figures import (
    frontier_figure,
    importance_figure,
    progress_figures,
    separation_figures,
    strength_figure,
)
from ray_abliterate.frontier import Trial
from ray_abliterate.measurements import Finding, comparison_text
from ray_abliterate.recipe import PromptSource, SuiteFile
from ray_abliterate.report_data import Figure, RunData, counts_text, value_text
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.saturation import bound_warnings
from ray_abliterate.suites import build


def write_report(directory: RunDirectory) -> Path:
    """Build the report, save it in the run directory, and say where."""
    directory.save_report(build_report(directory))
    return directory.report


def build_report(directory: RunDirectory) -> str:
    """The report as HTML text. It can be built at any time, also before the first trial."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    run = RunData.read(directory)
    figures = {"frontier": frontier_figure(run), "strengths": strength_figure(run)}
    figures |= separation_figures(run.base) | progress_figures(run)
    figures["importance"], importance_note = importance_figure(run)
    pages = Environment(
        loader=PackageLoader("ray_abliterate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("report.html.jinja").render(
        run=run,
        recipe=run.recipe,
        sets={
            "Prompts with the behaviour": run.recipe.prompts.behaviour,
            "Prompts without it": run.recipe.prompts.neutral,
        },
        source_name=_source_name,
        date=str(run.environment.get("started", ""))[:16].replace("T", " "),
        figures={name: figure for name, figure in figures.items() if figure["views"]},
        importance_note=importance_note,
        headers=run.baseline.scores if run.baseline else run.best[0].scores if run.best else (),
        suites=_suites(directory),
        rows=[_row(run, trial, directory.path) for trial in run.frontier.members],
        warnings=[*_bounds(run), *run.environment.get("warnings", [])],
        environment=list(_flat({k: v for k, v in run.environment.items() if k not in HIDDEN})),
        plotly=Markup(get_plotlyjs()),
    )


HIDDEN = ("warnings", "suites")
"""Of `environment.json`, shown elsewhere."""


def _suites(directory: RunDirectory) -> Figure:
    """Names of suites, and a row of texts for each model."""
    settings = SuiteFile.of(directory.environment.get("suites", ()))
    kept, suites = directory.measurements(settings), build(settings, directory.base)
    rows = [
        (model, [_suite_texts(kept.finding(model, suite)) for suite in suites])
        for model in kept.labels
    ]
    return {"names": [suite.name for suite in suites], "rows": rows}


def _suite_texts(found: Finding | None) -> tuple[str, str]:
    """Score and interval; difference from the base model."""
    if found is None or found.score is None:
        return "", ""
    score = found.score
    text = f"{value_text(score)} [{score.low:.3g}, {score.high:.3g}]"
    compared = comparison_text(found.comparison) if found.comparison else ""
    return text + ("" if found.whole else " (not all chunks)"), compared


def _bounds(run: RunData) -> list[str]:
    return bound_warnings(run.frontier, run.space) if run.space else []


def _source_name(source: PromptSource) -> str:
    name = source.builtin or source.file or source.folder or source.dataset or ""
    return f"{name} {source.split}".rstrip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as pairs of a dotted key and a text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _row(run: RunData, trial: Trial, path: Path) -> Figure:
    """One line of the table of frontier members."""
    assert trial.scorecard is not None
    base = {s.name: s for s in run.baseline.scores} if run.baseline else {}
    cells = []
    for score in trial.scorecard.scores:
        was = base.get(score.name)
        before = f"{value_text(was)} {counts_text(was)}".rstrip() if was else ""
        cells.append((score.name, value_text(score), counts_text(score), before))
    where, number = shlex.quote(path.as_posix()), trial.number
    commands = [
        f"ray-abliterate show {where} --trial {number}",
        f"ray-abliterate export {where} --trial {number} --to DIR",
        f"ray-abliterate chat {where} --trial {number}",
    ]
    return {"trial": trial, "knee": trial is run.frontier.knee, "cells": cells} | {
        "commands": commands
    }
