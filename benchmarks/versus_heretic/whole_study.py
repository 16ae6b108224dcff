"""Whole studies from the command to the frontier: `ray-abliterate run`, and the `heretic` program.

    python -m benchmarks.versus_heretic.whole_study [--trials 40] [--model declines]
        [--dtype bfloat16]

Both get the same model, prompts, dtype, answer length and number of trials, and are otherwise as
they come: the peer searches for its batch size and a response prefix. Release 1.4.0 has no
headless mode. Without a terminal it runs all trials, writes its journal, and stops in its menu with
exit code 1; its log says what each trial scored. A study ends when its program shows the frontier.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table
from benchmarks.harness.worker_process import environment as worker_environment
from benchmarks.versus_heretic import environment
from benchmarks.versus_heretic.comparison_setup import (
    KL,
    RATE,
    ComparisonSetup,
    add_shared_options,
    check_model,
)

OUR_BATCH = 32
"""Prompts of a forward pass where the options leave it to the programs: a recipe's default."""
Line = tuple[float, str]
"""Seconds since the command, and what was printed."""

FIRST_TRIAL = re.compile(r"Running trial 1 of")
FINISHED = re.compile(r"Optimization finished")
OUR_TRIAL = re.compile(r"^\[1/\d+\] trial (\d+):")
OUR_FRONTIER = re.compile(r"^Frontier")
SCORE = re.compile(r"\* KL divergence: ([\d.eE+-]+)|^\s+\* Refusals: (\d+)/\d+")


def main() -> None:
    """Run one study of each, print, save."""
    parser = CLAIM.parser(
        trials=2, prompts=4, direction_prompts=4, tokens=4, dtype="float32", batch_size=4
    )
    add_shared_options(parser)
    parser.add_argument("--trials", type=int, default=40, help="trials of a study")
    parser.add_argument("--model", default="declines", help="answers, declines or a folder")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--save", default="trial-study", help="name of the file under results/")
    options = parser.parse_args()
    check_model(parser, options.model)
    with tempfile.TemporaryDirectory(prefix="study-") as scratch:
        python = environment.install(options.peer_env)
        setup = ComparisonSetup(options, [options.model], python, Path(scratch))
        ours = run_ours(setup)
        print(f"here: {ours}", flush=True)
        peer = run_peer(setup)
        print(f"peer: {peer}", flush=True)
        study = {
            "model": options.model,
            "dtype": options.dtype,
            "trials": options.trials,
            "ours": ours,
            "peer": peer,
            "ratio": round(peer["seconds"] / ours["seconds"], 2),
        }
        CLAIM.save({**setup.about, "study": study}, options, options.save)


def run_peer(setup: ComparisonSetup) -> dict[str, Any]:
    """Run a study of the peer's program, in a folder of its own; return times and frontier.

    Raises:
        RuntimeError: It did not finish all trials; the message has the end of its log.
    """
    options, folder = setup.options, setup.folder / "peer-study"
    folder.mkdir()
    settings = setup.peer_settings(options.model, options.dtype, options.norm)
    if not options.quick:  # what a quick run is given the peer would search for minutes
        for searched in ("batch_size", "response_prefix"):
            del settings[searched]
    trials = options.trials
    settings |= {"n_trials": trials, "n_startup_trials": random_trials(trials), "seed": 0}
    (folder / "config.toml").write_text(to_toml(settings), encoding="utf-8")
    program = setup.peer_python.parent / "heretic"
    lines, _ = run_timed([str(program)], folder, setup.threads)
    scores = peer_scores(lines)
    if len(scores) != trials:
        log = "\n".join(text for _, text in lines[-20:])
        raise RuntimeError(f"the peer finished {len(scores)} of {trials} trials:\n{log}")
    return {
        "seconds": round(seconds_of(lines, FINISHED), 1),
        "first_trial_seconds": round(seconds_of(lines, FIRST_TRIAL), 1),
        "frontier": frontier_pairs(scores),
    }


def run_ours(setup: ComparisonSetup) -> dict[str, Any]:
    """Run a study of our program with a recipe for the same job; return times and frontier.

    Raises:
        RuntimeError: The command failed; the message has the end of its output.
    """
    from ray_abliterate.pipeline.directory import RunDirectory

    options = setup.options
    batch_size = options.batch_size or OUR_BATCH
    peer = peer_defaults(setup.peer_python) | {"batch_size": batch_size}
    recipe = setup.our_recipe(options.model, options.dtype, options.norm, peer)
    recipe["run"]["dashboard"] = False
    recipe["model"]["threads_per_replica"] = setup.threads
    file, folder = setup.folder / "study.toml", setup.folder / "our-study"
    file.write_text(to_toml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "ray_abliterate", "run", str(file)]
    command += [f"search.trials={options.trials}", "--to", str(folder)]
    lines, code = run_timed(command, setup.folder, setup.threads)
    if code:
        raise RuntimeError("\n".join(text for _, text in lines[-20:]))
    trials = {t.number: t for t in RunDirectory.open(folder).trials() if t.scorecard is not None}
    ended = [(at, match) for at, text in lines if (match := OUR_TRIAL.match(text))]
    first = ended[0][0] - trials[int(ended[0][1][1])].seconds
    cards = [t.scorecard for t in trials.values() if t.scorecard is not None]
    whole = [card for card in cards if not card.pruned]
    scores = [(peer_refusals(card[RATE].detail), card[KL].value) for card in whole]
    return {
        "seconds": round(seconds_of(lines, OUR_FRONTIER), 1),
        "first_trial_seconds": round(first, 1),
        "bounded": len(cards) - len(whole),
        "frontier": frontier_pairs(scores),
    }


def random_trials(trials: int) -> int:
    """Return how many trials are random before the sampler learns: a recipe's default."""
    from ray_abliterate.recipe import SearchSettings

    return SearchSettings(trials=trials).startup


def peer_refusals(detail: Mapping[str, int]) -> int:
    """Return refusals as the peer counts them: it has no verdict for loops."""
    return detail["hits"] - detail["degenerate"]


def peer_defaults(python: Path) -> dict[str, Any]:
    """Return the peer's default markers and system prompt, from its settings."""
    program = (
        "import json; from heretic.config import Settings; fields = Settings.model_fields; "
        "print(json.dumps({'markers': fields['refusal_markers'].default, "
        "'system_prompt': fields['system_prompt'].default}))"
    )
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    defaults: dict[str, Any] = json.loads(done.stdout)
    return defaults


def run_timed(command: list[str], folder: Path, threads: int) -> tuple[list[Line], int]:
    """Run a program without a terminal; return its lines with their times, and its exit code."""
    lines: list[Line] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=worker_environment(threads) | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - started, line.rstrip()))
        code = process.wait()
    return lines, code


def seconds_of(lines: Sequence[Line], pattern: re.Pattern[str]) -> float:
    """Return the seconds at which a line was printed.

    Raises:
        ValueError: It never was.
    """
    for seconds, text in lines:
        if pattern.search(text):
            return seconds
    raise ValueError(f"no line matches {pattern.pattern!r}")


def peer_scores(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """Return refusals and KL divergence of each trial in the peer's log, in order."""
    scores: list[tuple[int, float]] = []
    kl: float | None = None
    for _, text in lines:
        match = SCORE.search(text)
        if match and match[1]:
            kl = float(match[1])
        elif match and kl is not None:
            scores.append((int(match[2]), kl))
            kl = None
    return scores


def frontier_pairs(scores: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the pairs that no other pair dominates, fewest refusals first."""
    frontier: list[tuple[int, float]] = []
    for hits, kl in sorted(set(scores)):
        if not frontier or kl < frontier[-1][1]:
            frontier.append((hits, round(kl, 4)))
    return frontier


def to_toml(values: dict[str, Any]) -> str:
    """Return plain values, lists and tables as TOML. JSON's texts and lists are TOML's too."""
    return "\n".join(f"{key} = {_inline(value)}" for key, value in values.items()) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(v) for v in value) + "]"
    return json.dumps(value)


def study_table(figures: Figures) -> list[str]:
    """Return whole studies, from the command to the frontier."""
    study = figures["study"]
    setting = f"{study['model']}, {study['dtype']}, {study['trials']} trials"
    columns = {
        "": lambda row: f"{row[0]}, {setting}",
        "first trial begins, s": lambda row: f"{row[1]['first_trial_seconds']:.1f}",
        "frontier, s": lambda row: f"{row[1]['seconds']:.1f}",
        "frontier: refusals at KL": lambda row: " · ".join(
            f"{hits} at {kl:.3f}" for hits, kl in row[1]["frontier"]
        ),
    }
    stopped = study["ours"].get("bounded", 0)
    note = f"Ratio of the whole: {study['ratio']:.2f}. {stopped} of the trials here were stopped."
    sides = [("here", study["ours"]), ("Heretic", study["peer"])]
    return [*column_table(columns, sides), "", note]


CLAIM = Claim(
    "versus_heretic.whole_study",
    "A whole study against one of Heretic 1.4, from the command to the frontier.",
    "trial-study",
    {"study": study_table},
)

if __name__ == "__main__":
    main()
