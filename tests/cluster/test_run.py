"""The whole story on the planted model, and again after it was stopped."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ModelError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.heretic.import_study import import_study
from ray_abliterate.pipeline.initial_points import try_layers
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import PromptSets
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.pipeline.run import run
from ray_abliterate.recipe import Recipe, RefusalLogOdds
from ray_abliterate.search.frontier import Frontier, Trial
from tests.conftest import RECIPE
from tests.support.run_contexts import run_context

pytestmark = pytest.mark.ray

COMMAND = [sys.executable, "-m", "ray_abliterate"]


def test_a_run_finds_the_planted_direction_and_an_edit_that_removes_the_behaviour(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe, recipe_file.read_text())
    frontier = run(recipe, directory, tmp_path)
    best = min(frontier.members, key=lambda t: t.scorecard.losses)  # type: ignore[union-attr]
    baseline = directory.baseline()
    assert best.scorecard is not None and baseline is not None
    assert baseline.scorecard["keyword-rate"].value == 1.0
    assert baseline.scorecard["kl-divergence"].value == 0.0
    assert best.scorecard["keyword-rate"].value == 0.0
    assert 0 < best.scorecard["kl-divergence"].value < 0.01
    directions = directory.directions()
    assert directions is not None
    assert float(directions.vectors[PLANTED_LAYER] @ planted_axes()[0]) > 0.999
    assert len(directory.trials()) == recipe.search.trials
    facts = directory.read_environment()
    assert facts["model"]["layers"] == 4 and facts["prompts"]["behaviour"]["prompts"] == 7
    # a finished run, taken up again, does nothing and loses nothing
    before = (tmp_path / "run" / "trials.jsonl").read_bytes()
    assert run(recipe, directory, tmp_path).members == frontier.members
    assert (tmp_path / "run" / "trials.jsonl").read_bytes() == before
    # other weights under the same name are refused
    facts = directory.read_environment()["model"]
    directory.record_facts(model={**facts, "fingerprint": "other"})
    with pytest.raises(ModelError, match="not the ones the run began with"):
        run(recipe, directory, tmp_path)


def with_replicas(recipe: Recipe, count: int) -> Recipe:
    model = recipe.model.model_copy(update={"replicas": count})
    return recipe.model_copy(update={"model": model})


def test_prompts_that_are_left_out_and_layers_that_are_tried_are_the_same_on_one_and_two_replicas(
    recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet, tmp_path: Path
) -> None:
    mixed = [PromptSet(s.name, (*s.prompts, other.prompts[-1]))
             for s, other in ((behaviour, neutral), (neutral, behaviour))]  # fmt: skip
    odds = RefusalLogOdds.model_validate(
        {"kind": "refusal-log-odds", "goal": "report", "openings": ["sorry"],
         "prompts": {"file": "behaviour.txt"}}
    )  # fmt: skip
    prompts = recipe.prompts.model_copy(update={"filter_by_behaviour": True, "least_prompts": 7})
    search = recipe.search.model_copy(update={"seeds": "log-odds"})
    change = {"prompts": prompts, "search": search, "scorers": (*recipe.scorers, odds)}
    recipe = recipe.model_copy(update=change)
    scored = {"keyword-rate": behaviour, "kl-divergence": neutral, odds.name: behaviour}
    sets, found = PromptSets(*mixed, scored), []
    for count in (1, 2):
        directory = RunDirectory.create(tmp_path / str(count), recipe, "")
        with ReplicaPool.start(with_replicas(recipe, count), str(planted), scored) as pool:
            context = run_context(directory, pool)
            record_environment(context)
            setup, shards = find_directions(context, sets)
            try_layers(context, sets.scored, setup, shards)
        filtered = directory.read_environment()["filtered"]
        assert [filtered[s.name]["left_out"] for s in mixed] == [[7], [7]]
        selection = directory.selection()
        assert selection is not None
        found.append((setup.directions.vectors, filtered, selection.scores, selection.chosen))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][3].layer >= PLANTED_LAYER


def test_trials_share_passes_and_the_frontier_is_scored_alone(
    recipe_file: Path, tmp_path: Path
) -> None:
    options = ["search.trials_per_pass=3", "model.dtype=bfloat16", "search.dominance_stop=false"]
    done = subprocess.run(
        [*COMMAND, "run", "recipe.toml", "--profile", *options, "--to", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    directory = RunDirectory.open(tmp_path / "run")
    trials = directory.trials()
    assert len(trials) == 6 and all(trial.scorecard for trial in trials)
    frontier = Frontier.of(trials).members
    assert not any(trial.shared for trial in frontier)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").open()]
    assert any(line.get("shared") for line in lines), "no trial shared a pass"
    table = (tmp_path / "run" / "profile" / "stages.txt").read_text()
    assert {"edit", "prompts", "decode", "restore", "else"} <= set(table.split())
    assert "decode" in done.stdout
    trace = gzip.decompress((tmp_path / "run" / "profile" / "trial.json.gz").read_bytes())
    assert any(event.get("name") == "decode" for event in json.loads(trace)["traceEvents"])
    assert directory.tuning() is not None


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def wait_for_trials(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    file = folder / "run" / "trials.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= count:
            return
        time.sleep(0.1)
    pytest.fail(f"no {count} trials: {process.communicate(timeout=10)[0]}")


def test_a_run_that_is_stopped_loses_no_finished_trial_and_resumes_to_exactly_n(
    recipe_file: Path, planted: Path, tmp_path: Path
) -> None:
    recipe_file.write_text(RECIPE.format(model=planted, replicas=1, trials=1000))
    arguments = ("run", "recipe.toml", "--to", "run")
    finished: dict[int, Trial] = {}
    for sign in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = started(tmp_path, *arguments)
        wait_for_trials(tmp_path, len(finished) + 5, process)
        process.send_signal(sign)
        output = process.communicate(timeout=90)[0]
        if sign != signal.SIGKILL:
            assert process.returncode == 130, output
            assert "ray-abliterate resume" in output
        directory = RunDirectory.open(tmp_path / "run")
        after = {trial.number: trial for trial in directory.trials()}
        assert len(after) >= len(finished) + 5
        assert {number: after[number] for number in finished} == finished
        finished, arguments = after, ("resume", "run")
    wanted = len(finished) + 4
    last = started(tmp_path, "resume", "run", "--trials", str(wanted))
    output = last.communicate(timeout=200)[0]
    assert last.returncode == 0, output
    after = {trial.number: trial for trial in directory.trials()}
    assert {number: after[number] for number in finished} == finished
    assert len(after) == wanted
    plans = [trial.plan for trial in after.values()]
    assert len(set(plans)) == len(plans)
    lines = (tmp_path / "run" / "study.journal").read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def test_the_plans_of_a_study_of_heretics_are_tried_in_parallel(
    recipe_file: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recipe_file` left the prompts that the study names."""
    monkeypatch.chdir(tmp_path)
    journal = Path(__file__).parents[1] / "support" / "heretic" / "heretic-1.4.jsonl"
    made = import_study(journal, tmp_path / "run", SilentProgress(), str(planted))
    wanted = len(made.trials) + 2
    done = started(tmp_path, "resume", "run", "--trials", str(wanted))
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output
    trials = RunDirectory.open(tmp_path / "run").trials()
    assert len(trials) == wanted and all(trial.scorecard for trial in trials)
    peaks = sorted(trial.params["attn.o_proj.max_weight"] for trial in made.trials)
    tried = sorted(dict(trial.plan.profiles)["attn"].peak for trial in trials[: len(made.trials)])
    assert tried == pytest.approx(peaks)
