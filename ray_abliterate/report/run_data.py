"""What the report and its figures know of a run, and how they word it."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_abliterate.directions.layer_selection import LayerSelection
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.suite_results import BASE, Finding, comparison_text
from ray_abliterate.report.suite_curves import SuiteCurves
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard
from ray_abliterate.search.score_text import counts_text, number_text, value_text
from ray_abliterate.search.space import SearchSpace


@dataclass(frozen=True)
class RunData:
    """What is read of the run directory."""

    recipe: Any
    environment: Mapping[str, Any]
    trials: tuple[Trial, ...]
    frontier: Frontier
    base: Baseline | None
    suites: SuiteCurves
    selection: LayerSelection | None = None

    @classmethod
    def read(cls, directory: RunDirectory) -> "RunData":
        """Read a run directory."""
        trials = directory.trials()
        environment, base = directory.read_environment(), directory.baseline()
        found = SuiteCurves.read(directory)
        frontier, selection = Frontier.of(trials), directory.selection()
        return cls(directory.read_recipe(), environment, trials, frontier, base, found, selection)

    @property
    def finished(self) -> list[tuple[Trial, Scorecard]]:
        """Trials that were scored in full."""
        scored = [t for t in self.trials if not t.pruned]
        return [(t, t.scorecard) for t in scored if t.scorecard is not None]

    @property
    def pruned(self) -> list[tuple[Trial, Scorecard]]:
        """Trials that were stopped early, with bounds for scores."""
        return [(t, t.scorecard) for t in self.trials if t.pruned and t.scorecard is not None]

    @property
    def failed(self) -> list[Trial]:
        """Trials without."""
        return [t for t in self.trials if t.scorecard is None]

    @property
    def best(self) -> list[Scorecard]:
        """The frontier's scorecards."""
        return [t.scorecard for t in self.frontier.members if t.scorecard is not None]

    @property
    def baseline(self) -> Scorecard | None:
        """The base model's scorecard, if it was measured."""
        return self.base.scorecard if self.base else None

    @property
    def objectives(self) -> tuple[Score, ...]:
        """Scores that were searched for."""
        return self.best[0].objectives if self.best else ()

    @property
    def space(self) -> SearchSpace | None:
        """The search space, if the model is known."""
        facts = self.environment.get("model")
        if not isinstance(facts, Mapping) or not {"layers", "hidden", "components"} <= set(facts):
            return None
        shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
        return SearchSpace.of(shape, self.recipe.search.space, self.recipe.edit.norm)

    @property
    def layers(self) -> int:
        """Blocks of the model; 0 if they are not known."""
        return (
            self.space.shape.layers
            if self.space
            else len(self.base.separation if self.base else ())
        )

    def validation_texts(self, trial: Trial | None) -> list[str]:
        """A line for each suite that measured a trial, or the base model."""
        lines = []
        for name, found in self.suites.of(trial).items():
            score, compared = finding_texts(found)
            beside = f"; {compared} from the base model" if compared else ""
            lines += [f"{name} {score}{beside}"] if score else []
        return lines


def escaped(text: str) -> str:
    """A text as plotly shows it, whatever is in it; it knows `&lt;`, but not `&quot;`."""
    return html.escape(text, quote=False)


def title_text(score: Score) -> str:
    """Name and unit, escaped."""
    return escaped(f"{score.name} ({score.unit})" if score.unit else score.name)


def model_text(label: str) -> str:
    """A model of suites' results, as people call it."""
    return "base model" if label == BASE else label.replace("-", " ")


def finding_texts(found: Finding | None) -> tuple[str, str]:
    """Score with its interval; difference from the base model with its own."""
    if found is None or found.score is None:
        return "", ""
    compared = comparison_text(found.comparison) if found.comparison else ""
    return value_text(found.score) + ("" if found.whole else " (not all chunks)"), compared


def hover_text(
    label: str, scorecard: Scorecard, plan: Plan | None = None, more: Sequence[str] = ()
) -> str:
    """What a point says when pointed at, escaped: scores, `more`, the plan."""
    lines = [f"<b>{escaped(label)}</b>"]
    lines += [escaped(f"{s.name} {value_text(s)} {counts_text(s)}") for s in scorecard.scores]
    lines += [escaped(text) for text in more]
    if plan is not None:
        where = f" {number_text(plan.direction_layer)}" if plan.scope == "global" else ""
        if plan.scope == "per-layer" and plan.source_offset is not None:
            where = f" {plan.source_offset:+.2f} layers off"
        lines.append(f"direction {plan.scope}{where}, norm {plan.norm}")
        for name, p in plan.profiles:
            tent = f"peak {number_text(p.peak)} at layer {number_text(p.peak_layer)}"
            sides = f"floor {number_text(p.floor)}, reach {number_text(p.reach)}"
            lines.append(f"{escaped(name)}: {tent}, {sides}" if p.peak > 0 else f"{name}: off")
    return "<br>".join(lines)
