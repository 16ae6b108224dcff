"""Read what suites measured of a run's models, and how the score went while they measured."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ray_abliterate.errors import RayAbliterateError, ScoreError
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.evaluation.suites.suite import Suite, SuiteChunk
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.suite_results import Finding, SuiteResults, label
from ray_abliterate.recipe import SuiteFile
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Score

Curve = tuple[tuple[int, Score], ...]
"""A suite's main score after a number of items, in the order in which they were measured."""


@dataclass(frozen=True)
class SuiteSummary:
    """All that suites measured of a run's models.

    Attributes:
        names: Names of the suites, in order.
        findings: By model (`base`, `trial-17`), then suite; only what was measured.
        curves: By suite, then model; of suites that score something.
        problems: Warnings about results that cannot be read, and are left out.
    """

    names: tuple[str, ...] = ()
    findings: Mapping[str, Mapping[str, Finding]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: RunDirectory) -> "SuiteSummary":
        """Read the results in a run directory; what cannot be read becomes a warning."""
        try:
            settings = SuiteFile.of(directory.read_environment().get("suites", ()))
            suites = build_suites(settings, directory.read_base())
            results = directory.suite_results(settings)
        except (RayAbliterateError, ValueError) as error:
            return cls(problems=(f"Results of suites are left out: {error}",))
        names, problems = [], []
        findings: dict[str, dict[str, Finding]] = {model: {} for model in results.labels}
        curves: dict[str, Mapping[str, Curve]] = {}
        for suite in suites:
            try:
                by_model, drawn = _findings(results, suite), _curves(results, suite)
            except RayAbliterateError as error:
                problems.append(f"Results of the suite {suite.name} are left out: {error}")
                continue
            names.append(suite.name)
            curves |= {suite.name: drawn} if drawn else {}
            for model, finding in by_model.items():
                findings[model][suite.name] = finding
        measured = {model: by_suite for model, by_suite in findings.items() if by_suite}
        return cls(tuple(names), measured, curves, tuple(problems))

    def of(self, trial: Trial | None) -> Mapping[str, Finding]:
        """Return findings of a trial, or of the base model if None, by suite."""
        return self.findings.get(label(trial.number if trial else None), {})


def _findings(results: SuiteResults, suite: Suite) -> dict[str, Finding]:
    findings = {model: results.finding(model, suite) for model in results.labels}
    return {model: finding for model, finding in findings.items() if finding is not None}


def _curves(results: SuiteResults, suite: Suite) -> dict[str, Curve]:
    curves = {
        model: _curve(suite, results.of(model, suite.name).chunks) for model in results.labels
    }
    return {model: curve for model, curve in curves.items() if curve}


def _curve(suite: Suite, chunks: Sequence[SuiteChunk]) -> Curve:
    """Return the score after 1, 2, 4, … chunks and after all.

    Together these cost little more than the last one alone.
    """
    stops = [2**power for power in range(len(chunks).bit_length())]
    points = []
    for stop in dict.fromkeys([*stops, len(chunks)] if chunks else []):
        with suppress(ScoreError):  # the first few items may say nothing
            scores = suite.summary(chunks[:stop])
            items = sum(len(chunk.items) for chunk in chunks[:stop])
            points += [(items, score) for score in scores[:1]]
    return tuple(points)
