"""Tables for the terminal: the frontier, layers, suites, direction methods, and a long text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ray_abliterate.directions.comparison.compare import MethodComparison
from ray_abliterate.directions.layer_selection import TABLE_HEADER, LayerSelection
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.pipeline.suite_results import (
    BASE,
    Finding,
    SuiteResults,
    comparison_text,
    label,
)
from ray_abliterate.pipeline.text_evaluation import TextResults
from ray_abliterate.report.directions_page import (
    METHODS_HEADER,
    cosine_rows,
    method_rows,
    stability_rows,
)
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.score_text import describe_score


def count_trials(trials: Sequence[Trial], planned: int | None = None) -> str:
    """Return a sentence such as `40 of 200 trials, 11 stopped early, 0 failed`."""
    stopped = sum(trial.pruned for trial in trials)
    failed = sum(trial.error is not None for trial in trials)
    count = f"{len(trials)} of {planned}" if planned else f"{len(trials)}"
    return f"{count} trials, {stopped} stopped early, {failed} failed"


def frontier_table(
    frontier: Frontier,
    baseline: Scorecard | None = None,
    rows: int | None = None,
    findings: Mapping[tuple[str, str], Finding] | None = None,
) -> Table:
    """Return the frontier as a table, the base model on top and the knee marked.

    Args:
        frontier: The trials that are shown, a row each.
        baseline: Scores of the base model.
        rows: At most so many trials, both ends among them; all if None.
        findings: What suites measured so far, by model label and suite; a column per suite.
    """
    table = Table(title="Frontier", title_justify="left", show_edge=False, pad_edge=False)
    cards = [t.scorecard for t in frontier.members if t.scorecard]
    cards += [baseline] if baseline else []
    names = [score.name for score in cards[0].scores] if cards else []
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(name)
    suites = list(dict.fromkeys(suite for _, suite in findings or ()))
    for suite in suites:
        table.add_column(suite)
    table.add_column("scope")
    table.add_column("seconds", justify="right")

    def suite_cells(model: str) -> Iterator[str]:
        return (finding_text((findings or {}).get((model, suite))) for suite in suites)

    if baseline is not None:
        scores = (describe_score(score) for score in baseline.scores)
        table.add_row(BASE, *scores, *suite_cells(BASE), "", "")
    members = _thin_out(frontier.members, rows)
    knee = frontier.knee.number if frontier else None
    for trial in members:
        assert trial.scorecard is not None
        mark = " ◆" if trial.number == knee else ""
        layer = f"layer {trial.plan.direction_layer:.1f}"
        scope = layer if trial.plan.scope == "global" else trial.plan.scope
        scores = (describe_score(score) for score in trial.scorecard.scores)
        measured = suite_cells(label(trial.number))
        table.add_row(f"{trial.number}{mark}", *scores, *measured, scope, f"{trial.seconds:.1f}")
    if len(members) < len(frontier):
        table.caption = f"{len(members)} of {len(frontier)} trials on the frontier"
    return table


def layers_table(selection: LayerSelection) -> Table:
    """Return a table of what each layer's direction does to held-out prompts."""
    title = "Directions by layer, on held-out prompts"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column, heading in enumerate(TABLE_HEADER):
        numeric = 0 < column < len(TABLE_HEADER) - 1
        table.add_column(heading, justify="right" if numeric else "left")
    for row in selection.rows():
        table.add_row(*row)
    table.caption, table.caption_justify = selection.sentence(), "left"
    return table


def foreign_table(study: Mapping[str, Any], rows: int | None = None) -> Table:
    """Return the scores that another tool gave to the plans imported from it, as it worded them."""
    title = f"As scored by {study['tool']}, not by this run"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    trials = study["trials"][:rows]
    names = list(trials[0]["scores"]) if trials else []
    for heading in ("trial", f"number in {study['tool']}", *names):
        table.add_column(heading)
    for trial in trials:
        scores = (trial["scores"].get(name, "") for name in names)
        table.add_row(str(trial["number"]), str(trial["index"]), *scores)
    if len(trials) < len(study["trials"]):
        table.caption = f"{len(trials)} of {len(study['trials'])} trials"
    return table


def suites_table(results: SuiteResults, suites: Sequence[Suite]) -> Table:
    """Return the main score of each suite: a row per model, the base model first."""
    table = Table(title="Suites", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("model")
    for suite in suites:
        table.add_column(suite.name)
    for model in results.labels:
        table.add_row(model, *(finding_text(results.finding(model, suite)) for suite in suites))
    table.caption = (
        "second line: difference from the base model on the same items; * not measured to its end"
    )
    return table


def finding_text(finding: Finding | None) -> str:
    """Return a suite's main score, and on a second line its difference from the base model.

    A star marks a suite that was not measured to its end; one without a score says `measured`.
    """
    if finding is None:
        return ""
    text = describe_score(finding.score) if finding.score else "measured"
    text += "" if finding.whole else " *"
    return f"{text}\n{comparison_text(finding.comparison)}" if finding.comparison else text


def methods_tables(comparison: MethodComparison) -> list[Table]:
    """Return three tables: how methods separate, their cosines, and how stable they are."""
    sizes, stability = stability_rows(comparison)
    numbers = [str(index + 1) for index in range(len(comparison.methods))]
    cosines = [
        [f"{number} {row[0]}", *row[1:]]
        for number, row in zip(numbers, cosine_rows(comparison), strict=True)
    ]
    disjoint = f"Cosines of directions that share no prompt, layer {comparison.layer}"
    return [
        _method_table("Methods, on held-out prompts", METHODS_HEADER, method_rows(comparison)),
        _method_table(f"Cosines at layer {comparison.layer}", ("method", *numbers), cosines),
        _method_table(disjoint, ("method", *sizes), stability),
    ]


def _method_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column, heading in enumerate(header):
        table.add_column(heading, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def text_table(text: TextResults) -> Table:
    """Return perplexity, loss and speed on a long text: a row per model.

    The first model is the one that the others are compared with, chunk by chunk.
    """
    table = Table(show_edge=False, pad_edge=False)
    for heading in (
        "model",
        "perplexity",
        "nats per token",
        "by chunk",
        "tokens",
        "tokens/s",
        "carry",
    ):
        table.add_column(heading)
    base = next(iter(text.totals))
    for name, totals in text.totals.items():
        difference = text.difference(base, name) if name != base else None
        loss = f"{totals.loss:.5f}" + (f"\n{comparison_text(difference)}" if difference else "")
        table.add_row(
            name,
            f"{totals.perplexity:.5g}",
            loss,
            f"{totals.mean:.4f} ± {totals.deviation:.4f}",
            f"{totals.tokens:,}",
            f"{totals.tokens_per_second:,.0f}",
            totals.carry,
        )
    if len(text.totals) > 1:
        table.caption = f"second line: mean difference from {base} over chunks, 95 % interval"
    return table


def _thin_out(members: tuple[Trial, ...], rows: int | None) -> tuple[Trial, ...]:
    """Return at most `rows` members, evenly spaced, both ends among them."""
    if rows is None or len(members) <= rows:
        return members
    step = (len(members) - 1) / (rows - 1)
    return tuple(members[round(i * step)] for i in range(rows))
