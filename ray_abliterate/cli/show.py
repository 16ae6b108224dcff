"""One trial, printed: its plan, its scores beside the base model's, its answers on request."""

from rich.console import Console
from rich.table import Table

from ray_abliterate.cli.progress_display import describe_score
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.rescored import rescored
from ray_abliterate.search.frontier import Frontier, Trial


def print_trial(directory: RunDirectory, trial: Trial, output: Console) -> None:
    """Scores, then the plan with its strengths by layer."""
    assert trial.scorecard is not None
    baseline = directory.baseline()
    plan = trial.plan
    scope = "one direction for all layers" if plan.scope == "global" else "each layer's direction"
    where = f", taken at layer {plan.direction_layer:.2f}" if plan.scope == "global" else ""
    if plan.scope == "per-layer" and plan.source_offset is not None:
        where = f", taken {plan.source_offset:+.2f} layers from its own"
    output.print(f"Trial {trial.number}: {scope}{where}; norm mode {plan.norm!r}")
    if trial.bounded:
        _print_why_bounded(directory, trial, output)
    scores = Table(show_edge=False, pad_edge=False)
    for heading in ("score", "this trial", "base model", "goal", "unit"):
        scores.add_column(heading)
    full = {
        one.name: one.full for one in rescored(directory.environment) if one.trial == trial.number
    }
    if full:
        scores.add_column("exported, in full precision")
    for score in trial.scorecard.scores:
        base = describe_score(baseline.scorecard[score.name]) if baseline else ""
        exported = [f"{full[score.name]:.4g}"] if score.name in full else []
        scores.add_row(score.name, describe_score(score), base, score.goal, score.unit, *exported)
    output.print(scores)
    if quantization := directory.environment.get("model", {}).get("quantization"):
        more = "" if full else "; an export is scored in full precision, and shown here then"
        output.print(f"Scores are of weights quantized with {quantization}{more}.", markup=False)
    layers = directory.environment.get("model", {}).get("layers")
    profiles = Table(show_edge=False, pad_edge=False)
    for heading in ("component", "peak", "at layer", "floor", "reach", "strength by layer"):
        profiles.add_column(heading)
    for component, profile in plan.profiles:
        strengths = profile.strengths(layers) if layers else ()
        profiles.add_row(
            component,
            f"{profile.peak:.3f}",
            f"{profile.peak_layer:.1f}",
            f"{profile.floor:.2f}",
            f"{profile.reach:.1f}",
            _sparkline(strengths),
        )
    output.print(profiles)
    hint, verb, more = "Export it", "export", " --to DIR"
    if trial.bounded:
        hint, verb, more = "Talk to it", "chat", ""
    output.print(f"{trial.seconds:.1f} s. {hint} with:", markup=False)
    output.print(f"  ray-abliterate {verb} {directory.path} --trial {trial.number}{more}")


def _print_why_bounded(directory: RunDirectory, trial: Trial, output: Console) -> None:
    better = Frontier.of(directory.trials()).better_than(trial)
    other = f"trial {better.number}" if better else "another trial"
    output.print(
        f"Stopped early, because {other} is better whatever came: scores with ≥ or ≤ are bounds, "
        "the best they could still have been."
    )


def _sparkline(values: tuple[float, ...]) -> str:
    """A bar per layer, the tallest at strength 1.5."""
    bars = " ▁▂▃▄▅▆▇█"
    return "".join(bars[min(8, round(8 * value / 1.5))] for value in values)


def print_responses(directory: RunDirectory, number: int, output: Console) -> None:
    """Every recorded prompt and answer."""
    for row in directory.responses(number):
        mark = "shows the behaviour" if row["shows_behaviour"] else "clean"
        output.print(f"> {row['prompt']}", markup=False, style="bold")
        output.print(f"{row['answer']}\n  ({mark}, {row['tokens']} tokens)\n", markup=False)
