"""Texts and numbers by which the report compares trials with the base model and each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_abliterate.pipeline.suite_results import Finding
from ray_abliterate.report.figures.layers import strengths_of
from ray_abliterate.report.run_data import RunData, finding_texts
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score
from ray_abliterate.search.score_text import counts_text, number_text, value_text

GOALS = {
    "minimize": "lower is better",
    "maximize": "higher is better",
    "report": "shown, not searched for",
}


def headline(run: RunData) -> list[dict[str, Any]]:
    """Return a card for each score of the knee, with the base model's value and both places."""
    if not run.frontier or run.frontier.knee.scorecard is None:
        return []
    base = {score.name: score for score in run.baseline.scores} if run.baseline else {}
    cards = []
    for score in run.frontier.knee.scorecard.scores:
        base_score = base.get(score.name)
        cards.append(
            {
                "name": score.name,
                "goal": GOALS[score.goal],
                "value": plain_text(score),
                "unit": score.unit,
                "counts": _of_text(score),
                "interval": f"{_plain(score, score.low)} to {_plain(score, score.high)}",
                "base": plain_text(base_score) if base_score else "",
                "base_counts": _of_text(base_score) if base_score else "",
                "strip": strip(score, base_score),
            }
        )
    return cards


def plain_text(score: Score) -> str:
    """Return the value as people say it: a rate of counted answers in percent."""
    return score.relation + _plain(score, score.value)


def _plain(score: Score, value: float) -> str:
    if not counts_text(score):
        return number_text(value)
    return f"{100 * value:.{2 if value < 0.1 else 3}g}\u00a0%"


def _of_text(score: Score) -> str:
    return counts_text(score).replace("/", " of ")


def strip(score: Score, base: Score | None) -> dict[str, float]:
    """Return places along a line, in percent: of the value, its interval, and the base model."""
    values = [0.0, score.low, score.high, *([base.value] if base else [])]
    low, high = min(values), max([*values, 1.0] if counts_text(score) else values)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    places = {"value": place(score.value), "low": place(score.low)}
    places["width"] = round(place(score.high) - place(score.low), 2)
    return places | ({"base": place(base.value)} if base else {})


def sheets(run: RunData) -> dict[str, Any]:
    """Return what the page needs to compare any two models.

    Returns:
        `fields`, each with a name, a part and a goal, and `models`, each with a cell for each
        field (a text, then value, low and high if it is a number that is certain; None if there is
        nothing), strength over layers by component, and the direction's layer if it has one.
    """
    if not run.finished:
        return {}
    plans = [trial.plan for trial in run.trials if trial.scorecard is not None]
    fields = [
        *({"part": "Scores", "name": s.name, "unit": s.unit, "goal": s.goal} for s in _scores(run)),
        *({"part": "Suites", "name": name, **_suite_goal(run, name)} for name in run.suites.names),
        *({"part": "Plan", "name": name, "unit": "", "goal": ""} for name in _parameters(plans)),
    ]
    base = [_sheet(run, None, fields)] if run.baseline else []
    trials = [_sheet(run, trial, fields) for trial in run.trials if trial.scorecard is not None]
    return {"fields": fields, "models": [*base, *trials]}


def choices(run: RunData) -> dict[str, list[tuple[str, str]]]:
    """Return key and name of the models that can be compared, by group."""
    members, knee = run.frontier.members, run.frontier.knee if run.frontier else None
    on_frontier = [
        (str(t.number), f"trial {t.number}" + (" (knee)" if t is knee else "")) for t in members
    ]
    keys = {key for key, _ in on_frontier}
    finished = [(str(t.number), f"trial {t.number}") for t, _ in run.finished]
    stopped = [(str(t.number), f"trial {t.number}") for t, _ in run.pruned]
    groups = {
        "Original": [("base", "base model")] if run.baseline else [],
        "On the frontier": on_frontier,
        "Other trials": [(key, name) for key, name in finished if key not in keys],
        "Stopped early": stopped,
    }
    return {name: models for name, models in groups.items() if models}


def _scores(run: RunData) -> Sequence[Score]:
    """Return one score of each name, in the order of scorecards."""
    cards = [*([run.baseline] if run.baseline else []), *(card for _, card in run.finished)]
    return list({score.name: score for card in cards for score in card.scores}.values())


def _suite_goal(run: RunData, name: str) -> dict[str, str]:
    """Return unit and goal of a suite's score, from whichever model has one."""
    scores = [findings[name].score for findings in run.suites.findings.values() if name in findings]
    score = next((score for score in scores if score is not None), None)
    return {"unit": score.unit if score else "", "goal": score.goal if score else ""}


def _parameters(plans: Sequence[Plan]) -> list[str]:
    return list(dict.fromkeys(["norm", *(name for plan in plans for name in plan.to_params())]))


def _sheet(
    run: RunData, trial: Trial | None, fields: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Return the column of a trial, or of the base model if `trial` is None."""
    card, plan = (trial.scorecard, trial.plan) if trial else (run.baseline, None)
    scores = {score.name: score for score in card.scores} if card else {}
    values: dict[str, Any] = {"norm": plan.norm, **plan.to_params()} if plan else {}
    direction = plan.direction_layer if plan and plan.scope == "global" else None
    if direction is None:
        values.pop("direction_layer", None)  # a search draws one all the same
    cells: dict[str, dict[str, list[Any] | None]] = {
        "Scores": {name: _score_cell(score) for name, score in scores.items()},
        "Suites": {name: _suite_cell(finding) for name, finding in run.suites.of(trial).items()},
        "Plan": {name: _plan_cell(value) for name, value in values.items()},
    }
    return {
        "key": str(trial.number) if trial else "base",
        "name": f"trial {trial.number}" if trial else "base model",
        "cells": [cells[field["part"]].get(field["name"]) for field in fields],
        "strengths": strengths_of(plan, run.layers) if plan else {},
        "direction": direction,
    }


def _score_cell(score: Score) -> list[Any]:
    text = f"{value_text(score)} {counts_text(score)}".rstrip()
    return [text] if score.bound else [text, score.value, score.low, score.high]


def _suite_cell(finding: Finding) -> list[Any] | None:
    score, (text, difference) = finding.score, finding_texts(finding)
    if score is None:
        return None
    if difference:
        text = f"{text}; {difference} from the base model"
    return [text, score.value, score.low, score.high]


def _plan_cell(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else [number_text(value), value, value, value]
