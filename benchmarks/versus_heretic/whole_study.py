"""Whole studies from the command to the frontier: `ray-abliterate run`, and the `heretic` program.

Both get the same model, prompts, dtype, answer length and number of trials, and are otherwise as
they come: the peer searches for its batch size and a response prefix. Release 1.4.0 has no
headless mode. Without a terminal it runs all trials, writes its journal, and stops in its menu with
exit code 1; its log says what each trial found. A study ends when its program shows the frontier.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.worker_process import environment

OUR_BATCH = 32
"""Prompts of a forward pass where the options leave it to the programs: a recipe's default."""

Line = tuple[float, str]
"""Seconds since the command, and what was printed."""

FIRST_TRIAL = re.compile(r"Running trial 1 of")
FINISHED = re.compile(r"Optimization finished")
OUR_TRIAL = re.compile(r"^\[1/\d+\] trial (\d+):")
OUR_FRONTIER = re.compile(r"^Frontier")
SCORE = re.compile(r"\* KL divergence: ([\d.eE+-]+)|^\s+\* Refusals: (\d+)/\d+")


def compare(bench: Any, model: str, dtype: str) -> dict[str, Any]:
    """One study of each."""
    trials = bench.options.study
    ours = run_ours(bench, model, dtype, trials)
    print(f"here: {ours}", flush=True)
    peer = run_peer(bench, model, dtype, trials)
    print(f"peer: {peer}", flush=True)
    return {
        "model": model,
        "dtype": dtype,
        "trials": trials,
        "ours": ours,
        "peer": peer,
        "ratio": round(peer["seconds"] / ours["seconds"], 2),
    }


def run_peer(bench: Any, model: str, dtype: str, trials: int) -> dict[str, Any]:
    """The peer's program, in a folder of its own."""
    folder = bench.folder / "peer-study"
    folder.mkdir()
    settings = bench.peer_settings(model, dtype, bench.options.norm)
    for searched in ("batch_size", "response_prefix"):
        del settings[searched]
    settings |= {"n_trials": trials, "n_startup_trials": startup(trials), "seed": 0}
    (folder / "config.toml").write_text(toml(settings), encoding="utf-8")
    program = bench.peer_python.parent / "heretic"
    lines, _ = timed([str(program)], folder, bench.threads)
    found = scores(lines)
    if len(found) != trials:
        log = "\n".join(text for _, text in lines[-20:])
        raise RuntimeError(f"the peer finished {len(found)} of {trials} trials:\n{log}")
    return {
        "seconds": round(when(lines, FINISHED), 1),
        "first_trial_seconds": round(when(lines, FIRST_TRIAL), 1),
        "frontier": frontier(found),
    }


def run_ours(bench: Any, model: str, dtype: str, trials: int) -> dict[str, Any]:
    """Our program with a recipe for the same job."""
    from benchmarks.versus_heretic.our_worker import KL, RATE
    from ray_abliterate.pipeline.directory import RunDirectory

    shared = defaults(bench) | {"batch_size": bench.options.batch_size or OUR_BATCH}
    recipe = bench.our_recipe(model, dtype, bench.options.norm, shared)
    recipe["run"]["dashboard"] = False
    recipe["model"]["threads_per_replica"] = bench.threads
    file, folder = bench.folder / "study.toml", bench.folder / "our-study"
    file.write_text(toml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "ray_abliterate", "run", str(file)]
    command += [f"search.trials={trials}", "--to", str(folder)]
    lines, code = timed(command, bench.folder, bench.threads)
    if code:
        raise RuntimeError("\n".join(text for _, text in lines[-20:]))
    done = {t.number: t for t in RunDirectory.open(folder).trials() if t.scorecard is not None}
    ended = [(at, match) for at, text in lines if (match := OUR_TRIAL.match(text))]
    first = ended[0][0] - done[int(ended[0][1][1])].seconds
    cards = [t.scorecard for t in done.values() if t.scorecard is not None]
    whole = [card for card in cards if not card.bounded]
    found = [(refusals(card[RATE].detail), card[KL].value) for card in whole]
    return {
        "seconds": round(when(lines, OUR_FRONTIER), 1),
        "first_trial_seconds": round(first, 1),
        "bounded": len(cards) - len(whole),
        "frontier": frontier(found),
    }


def startup(trials: int) -> int:
    """Random trials before the sampler learns: ours unless a recipe says otherwise."""
    from ray_abliterate.recipe import SearchSettings

    return SearchSettings(trials=trials).startup


def refusals(detail: Mapping[str, int]) -> int:
    """As the peer counts them: it has no verdict for loops."""
    return detail["hits"] - detail["degenerate"]


def defaults(bench: Any) -> dict[str, Any]:
    """The peer's default markers and system prompt, asked of its settings."""
    program = (
        "import json; from heretic.config import Settings; fields = Settings.model_fields; "
        "print(json.dumps({'markers': fields['refusal_markers'].default, "
        "'system_prompt': fields['system_prompt'].default}))"
    )
    done = subprocess.run(
        [bench.peer_python, "-c", program], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def timed(command: list[str], folder: Path, threads: int) -> tuple[list[Line], int]:
    """Run a program without a terminal; its lines with their times, and its exit code."""
    lines: list[Line] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(threads) | {"COLUMNS": "200"},
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


def when(lines: Sequence[Line], wanted: re.Pattern[str]) -> float:
    """Seconds at which a line was printed.

    Raises:
        ValueError: it never was.
    """
    for seconds, text in lines:
        if wanted.search(text):
            return seconds
    raise ValueError(f"no line matches {wanted.pattern!r}")


def scores(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """Refusals and KL divergence of each trial in the peer's log, in order."""
    found: list[tuple[int, float]] = []
    kl: float | None = None
    for _, text in lines:
        match = SCORE.search(text)
        if match and match[1]:
            kl = float(match[1])
        elif match and kl is not None:
            found.append((int(match[2]), kl))
            kl = None
    return found


def frontier(found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Pairs that no other pair dominates, fewest refusals first."""
    kept: list[tuple[int, float]] = []
    for hits, kl in sorted(set(found)):
        if not kept or kl < kept[-1][1]:
            kept.append((hits, round(kl, 4)))
    return kept


def toml(values: dict[str, Any]) -> str:
    """Plain values, lists and tables as TOML. JSON's texts and lists are TOML's too."""
    return "\n".join(f"{key} = {_inline(value)}" for key, value in values.items()) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(v) for v in value) + "]"
    return json.dumps(value)
