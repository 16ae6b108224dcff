"""Read what the report shows of a run, and word it for tables and figures."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_abliterate.directions.layer_selection import LayerSelection
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.suite_results import BASE, Finding, comparison_text
from ray_abliterate.report.suite_summary import SuiteSummary
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard
from ray_abliterate.search.score_text import counts_text, number_text, value_text
from ray_abliterate.search.space import SearchSpace


@dataclass(frozen=True)
class RunData:
    """The contents of a run directory, read once.

    Attributes:
        recipe: The run's recipe.
        environment: Facts of `environment.json`.
        trials: All trials that ended, in order.
        frontier: Trials that no other trial dominates.
        base: The base model's scores, and how well each layer separates the prompt sets.
        suites: What suites measured.
        selection: What each layer's direction does, if that was measured.
    """

    recipe: Any
    environment: Mapping[str, Any]
    trials: tuple[Trial, ...]
    frontier: Frontier
    base: Baseline | None
    suites: SuiteSummary
    selection: LayerSelection | None = None

    @classmethod
    def read(cls, directory: RunDirectory) -> "RunData":
        """Read a run directory, complete or not."""
        trials = directory.trials()
        environment, base = directory.read_environment(), directory.baseline()
        suites, selection = SuiteSummary.read(directory), directory.selection()
        frontier = Frontier.of(trials)
        return cls(directory.read_recipe(), environment, trials, frontier, base, suites, selection)

    @property
    def finished(self) -> list[tuple[Trial, Scorecard]]:
        """Trials that were scored in full, with their scorecards."""
        scored = [t for t in self.trials if not t.pruned]
        return [(t, t.scorecard) for t in scored if t.scorecard is not None]

    @property
    def pruned(self) -> list[tuple[Trial, Scorecard]]:
        """Trials that were stopped early, with their bounds."""
        return [(t, t.scorecard) for t in self.trials if t.pruned and t.scorecard is not None]

    @property
    def failed(self) -> list[Trial]:
        """Trials that failed, and have no scorecard."""
        return [t for t in self.trials if t.scorecard is None]

    @property
    def best(self) -> list[Scorecard]:
        """Scorecards of the frontier, in its order."""
        return [t.scorecard for t in self.frontier.members if t.scorecard is not None]

    @property
    def baseline(self) -> Scorecard | None:
        """The base model's scorecard, if it was measured."""
        return self.base.scorecard if self.base else None

    @property
    def objectives(self) -> tuple[Score, ...]:
        """Scores of one trial that the search optimises; empty before the first trial."""
        return self.best[0].objectives if self.best else ()

    @property
    def space(self) -> SearchSpace | None:
        """The search space; None before the model is known."""
        facts = self.environment.get("model")
        if not isinstance(facts, Mapping) or not {"layers", "hidden", "components"} <= set(facts):
            return None
        shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
        return SearchSpace.of(shape, self.recipe.search.space, self.recipe.edit.norm)

    @property
    def layers(self) -> int:
        """Number of the model's blocks; 0 before it is known."""
        return (
            self.space.shape.layers
            if self.space
            else len(self.base.separation if self.base else ())
        )

    def validation_texts(self, trial: Trial | None) -> list[str]:
        """Return a line per suite that measured a trial, or the base model if `trial` is None."""
        lines = []
        for name, finding in self.suites.of(trial).items():
            score, difference = finding_texts(finding)
            suffix = f"; {difference} from the base model" if difference else ""
            lines += [f"{name} {score}{suffix}"] if score else []
        return lines


def escape_text(text: str) -> str:
    """Escape a text for plotly, which reads `&lt;` as HTML, but not `&quot;`."""
    return html.escape(text, quote=False)


def title_text(score: Score) -> str:
    """Return a score's name and unit, escaped, as the title of an axis."""
    return escape_text(f"{score.name} ({score.unit})" if score.unit else score.name)


def model_text(label: str) -> str:
    """Return what people call a model: `base model`, or `trial 17` for the label `trial-17`."""
    return "base model" if label == BASE else label.replace("-", " ")


def finding_texts(finding: Finding | None) -> tuple[str, str]:
    """Return a suite's score and its difference from the base model's, each with its interval.

    Either is empty if there is none.
    """
    if finding is None or finding.score is None:
        return "", ""
    difference = comparison_text(finding.comparison) if finding.comparison else ""
    return value_text(finding.score) + ("" if finding.whole else " (not all chunks)"), difference


def hover_text(
    label: str, scorecard: Scorecard, plan: Plan | None = None, more: Sequence[str] = ()
) -> str:
    """Return the text of a point on hovering, escaped: its scores, the lines `more`, its plan."""
    lines = [f"<b>{escape_text(label)}</b>"]
    lines += [escape_text(f"{s.name} {value_text(s)} {counts_text(s)}") for s in scorecard.scores]
    lines += [escape_text(text) for text in more]
    if plan is not None:
        source = f" {number_text(plan.direction_layer)}" if plan.scope == "global" else ""
        if plan.scope == "per-layer" and plan.source_offset is not None:
            source = f" {plan.source_offset:+.2f} layers off"
        lines.append(f"direction {plan.scope}{source}, norm {plan.norm}")
        for name, p in plan.profiles:
            tent = f"peak {number_text(p.peak)} at layer {number_text(p.peak_layer)}"
            sides = f"floor {number_text(p.floor)}, reach {number_text(p.reach)}"
            lines.append(f"{escape_text(name)}: {tent}, {sides}" if p.peak > 0 else f"{name}: off")
    return "<br>".join(lines)
