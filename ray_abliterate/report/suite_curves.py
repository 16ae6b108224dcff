"""What suites found of a run's models, read for the report."""

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
"""A suite's main score after so many items, in the order in which they were measured."""


@dataclass(frozen=True)
class SuiteCurves:
    """All that suites found.

    Attributes:
        names: Of the suites, in order.
        findings: By model (`base`, `trial-17`), then suite; only what is measured.
        curves: By suite, then model; of suites that score something.
        problems: Why something is left out that is there.
    """

    names: tuple[str, ...] = ()
    findings: Mapping[str, Mapping[str, Finding]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: RunDirectory) -> "SuiteCurves":
        """What the run directory holds; the report is made without what can't be read."""
        try:
            settings = SuiteFile.of(directory.read_environment().get("suites", ()))
            suites, kept = (
                build_suites(settings, directory.read_base()),
                directory.suite_results(settings),
            )
        except (RayAbliterateError, ValueError) as error:
            return cls(problems=(f"What suites found is left out: {error}",))
        names, problems = [], []
        findings: dict[str, dict[str, Finding]] = {model: {} for model in kept.labels}
        curves: dict[str, Mapping[str, Curve]] = {}
        for suite in suites:
            try:
                found, drawn = _findings(kept, suite), _curves(kept, suite)
            except RayAbliterateError as error:
                problems.append(f"What the suite {suite.name} found is left out: {error}")
                continue
            names.append(suite.name)
            curves |= {suite.name: drawn} if drawn else {}
            for model, finding in found.items():
                findings[model][suite.name] = finding
        known = {model: found for model, found in findings.items() if found}
        return cls(tuple(names), known, curves, tuple(problems))

    def of(self, trial: Trial | None) -> Mapping[str, Finding]:
        """What was found of a trial, or of the base model; by suite."""
        return self.findings.get(label(trial.number if trial else None), {})


def _findings(kept: SuiteResults, suite: Suite) -> dict[str, Finding]:
    found = {model: kept.finding(model, suite) for model in kept.labels}
    return {model: finding for model, finding in found.items() if finding is not None}


def _curves(kept: SuiteResults, suite: Suite) -> dict[str, Curve]:
    found = {model: _curve(suite, kept.of(model, suite.name).chunks) for model in kept.labels}
    return {model: curve for model, curve in found.items() if curve}


def _curve(suite: Suite, chunks: Sequence[SuiteChunk]) -> Curve:
    """After 1, 2, 4, … chunks and after all, so that it costs little more than the last point."""
    stops = [2**power for power in range(len(chunks).bit_length())]
    points = []
    for stop in dict.fromkeys([*stops, len(chunks)] if chunks else []):
        with suppress(ScoreError):  # nothing is known of the first few items
            scores = suite.summary(chunks[:stop])
            items = sum(len(chunk.items) for chunk in chunks[:stop])
            points += [(items, score) for score in scores[:1]]
    return tuple(points)
