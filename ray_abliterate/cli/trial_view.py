"""Print one trial: its plan, its scores beside the base model's, and its recorded answers."""

from rich.console import Console
from rich.table import Table

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.export_notes import full_precision_scores
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.score_text import describe_score

TALLEST = 1.5
"""Strength of the tallest bar of a sparkline."""


def print_trial(directory: RunDirectory, trial: Trial, output: Console) -> None:
    """Print a trial's scores, then its plan with the strength at each layer."""
    assert trial.scorecard is not None
    environment = directory.read_environment()
    model, plan = environment.get("model", {}), trial.plan
    scope = "one direction for all layers" if plan.scope == "global" else "each layer's direction"
    source = f", taken at layer {plan.direction_layer:.2f}" if plan.scope == "global" else ""
    if plan.scope == "per-layer" and plan.source_offset is not None:
        source = f", taken {plan.source_offset:+.2f} layers from its own"
    output.print(f"Trial {trial.number}: {scope}{source}; norm mode {plan.norm!r}")
    if trial.pruned:
        _print_why_pruned(directory, trial, output)
    exported = {
        score.name: score.full
        for score in full_precision_scores(environment)
        if score.trial == trial.number
    }
    output.print(_score_table(directory, trial, exported))
    if quantization := model.get("quantization"):
        hint = "" if exported else "; export the trial to score it in full precision"
        output.print(f"Scores are of weights quantized with {quantization}{hint}.", markup=False)
    output.print(_profile_table(trial, model.get("layers")))
    hint, verb, options = "Export it", "export", " --to DIR"
    if trial.pruned:
        hint, verb, options = "Talk to it", "chat", ""
    output.print(f"{trial.seconds:.1f} s. {hint} with:", markup=False)
    output.print(f"  ray-abliterate {verb} {directory.path} --trial {trial.number}{options}")


def _score_table(directory: RunDirectory, trial: Trial, exported: dict[str, float]) -> Table:
    """Return scores beside the base model's, and those of an export in full precision."""
    assert trial.scorecard is not None
    baseline = directory.baseline()
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("score", "this trial", "base model", "goal", "unit"):
        table.add_column(heading)
    if exported:
        table.add_column("exported, in full precision")
    for score in trial.scorecard.scores:
        base = describe_score(baseline.scorecard[score.name]) if baseline else ""
        full = [f"{exported[score.name]:.4g}"] if score.name in exported else []
        table.add_row(score.name, describe_score(score), base, score.goal, score.unit, *full)
    return table


def _profile_table(trial: Trial, layers: int | None) -> Table:
    """Return the profile of each component, with a sparkline if the model's depth is known."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("component", "peak", "at layer", "floor", "reach", "strength by layer"):
        table.add_column(heading)
    for component, profile in trial.plan.profiles:
        table.add_row(
            component,
            f"{profile.peak:.3f}",
            f"{profile.peak_layer:.1f}",
            f"{profile.floor:.2f}",
            f"{profile.reach:.1f}",
            _sparkline(profile.strengths(layers) if layers else ()),
        )
    return table


def _print_why_pruned(directory: RunDirectory, trial: Trial, output: Console) -> None:
    better = Frontier.of(directory.trials()).better_than(trial)
    other = f"trial {better.number}" if better else "another trial"
    output.print(
        f"Stopped early, since {other} is better whatever its remaining scores: scores with ≥ or ≤ "
        "are bounds, the best they could still have become."
    )


def _sparkline(values: tuple[float, ...]) -> str:
    """Return a bar per layer; the tallest stands for `TALLEST` and above."""
    bars = " ▁▂▃▄▅▆▇█"
    return "".join(bars[min(8, round(8 * value / TALLEST))] for value in values)


def print_responses(directory: RunDirectory, number: int, output: Console) -> None:
    """Print each recorded prompt with the trial's answer and its verdict."""
    for row in directory.responses(number):
        verdict = "shows the behaviour" if row["shows_behaviour"] else "clean"
        output.print(f"> {row['prompt']}", markup=False, style="bold")
        output.print(f"{row['answer']}\n  ({verdict}, {row['tokens']} tokens)\n", markup=False)
