"""Suites on real replicas: after a search, and by the command line."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch

from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.directions.directions import Directions
from ray_abliterate.evaluation.streaming.reader import TextRequest
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.run import run
from ray_abliterate.pipeline.suite_results import BASE, Finding, SuiteProgress, SuiteResults
from ray_abliterate.pipeline.suite_runner import AHEAD, BASE_MODEL, MeasuredModel, SuiteRunner
from ray_abliterate.pipeline.text_evaluation import TextEvaluation
from ray_abliterate.recipe import ModelSettings, Recipe, SuiteFile
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.testing.tiny import tiny_model

pytestmark = pytest.mark.ray

SUITES = """
[[suites]]
kind = "over-refusal"
name = "asked"
table = { file = "asked.jsonl" }
category = ""
markers = ["sorry"]
max_new_tokens = 3
chunk = 2
"""


def joining(cluster: Any) -> dict[str, str]:
    """Environment of a command that joins a cluster."""
    path = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": cluster.address}


def test_a_run_ends_with_its_suites_and_evaluate_adds_to_them(
    recipe_file: Path, tmp_path: Path, cluster: Any
) -> None:
    texts = (tmp_path / "behaviour.txt").read_text().splitlines()
    rows = [{"prompt": text, "label": "safe"} for text in texts]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = recipe_file.read_text().replace("replicas = 1", "replicas = 2") + SUITES
    recipe = Recipe.parse(text, "recipe.toml")
    directory = RunDirectory.create(tmp_path / "run", recipe, text)
    frontier = run(recipe, directory, tmp_path)
    results = directory.suite_results(recipe.suites)
    assert set(results.labels) == {BASE, *(f"trial-{t.number}" for t in frontier.members)}
    assert all(results.of(model, "asked").whole for model in results.labels)
    other = tmp_path / "more.toml"
    other.write_text(SUITES.replace('"asked"\n', '"again"\n').replace("tokens = 3", "tokens = 2"))
    command = [sys.executable, "-m", "ray_abliterate", "evaluate", str(directory.path)]
    trial = str(frontier.knee.number)
    done = subprocess.run(
        [*command, "--suites", str(other), "--trial", trial],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=joining(cluster),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again" in done.stdout and f"trial-{trial}" in done.stdout and "1 [" in done.stdout
    more = directory.suite_results(SuiteFile.load(other))
    assert more.labels == (BASE, f"trial-{trial}")


class Held(SilentProgress):
    """Lets the search go on only once the base model is measured; knows what was said when."""

    def __init__(self) -> None:
        self.measured = threading.Event()
        self.trials, self.during = 0, dict[str, int]()

    def trial(self, trial: Trial, done: int, total: int, frontier: Frontier) -> None:
        self.trials = done
        assert self.measured.wait(120), "nothing was measured while the search went on"

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        self.during.setdefault(model, self.trials)
        self.measured.set()


def asked(tmp_path: Path, count: int) -> str:
    """A suite of so many chunks."""
    texts = (tmp_path / "behaviour.txt").read_text().splitlines()
    rows = [
        {"prompt": f"{texts[i % len(texts)]} {'and ' * (i // len(texts))}why", "label": "safe"}
        for i in range(count)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SUITES.replace("chunk = 2", "chunk = 1")


def measured_alone(
    recipe: Recipe, directory: RunDirectory, subject: MeasuredModel, settings: Any, tmp_path: Path
) -> SuiteProgress:
    """The only suite on one model of a run, by replicas that nothing disturbs."""
    directions = directory.directions()
    assert directions is not None
    prefix = tuple(directory.read_environment()["response_prefix"])
    with ReplicaPool.start(recipe, recipe.model.name, {}) as pool:
        shared = pool.put(TrialSetup(directions, prefix, directory.tuning()))
        results = SuiteResults(tmp_path / "alone", settings)
        runner = SuiteRunner(pool, shared, results, SilentProgress())
        (found,) = runner.measure(subject, build_suites(settings, tmp_path), settings).values()
    return found


def test_the_frontier_is_measured_while_the_search_goes_on(
    recipe_file: Path, tmp_path: Path, cluster: Any
) -> None:
    suites = asked(tmp_path, 8)
    own = "\n[evaluation]\nreplicas = 1\nthreads_per_replica = 1\n"
    text = recipe_file.read_text() + suites + own
    recipe = Recipe.parse(text, "recipe.toml")
    directory = RunDirectory.create(tmp_path / "run", recipe, text)
    progress = Held()
    frontier = run(recipe, directory, tmp_path, progress)
    assert progress.during[BASE] < recipe.search.trials
    results = directory.suite_results(recipe.suites)
    assert {BASE, *(f"trial-{t.number}" for t in frontier.members)} <= set(results.labels)
    events_text = (directory.path / "events.jsonl").read_text()
    assert "validation-" not in events_text.replace("validation-cancelled", "")
    best = results.of(f"trial-{frontier.knee.number}", "asked")
    alone = Recipe.parse(text.replace(own, ""), "recipe.toml")
    found = measured_alone(
        alone, directory, MeasuredModel.of(frontier.knee), recipe.suites, tmp_path
    )
    assert {c.chunk: c.values for c in found.chunks} == {c.chunk: c.values for c in best.chunks}


def test_an_evaluator_that_is_killed_costs_one_chunk(
    recipe_file: Path, tmp_path: Path, cluster: Any
) -> None:
    suites = asked(tmp_path, 60)
    own = "\n[evaluation]\nreplicas = 1\nthreads_per_replica = 1\n"
    recipe = Recipe.parse(recipe_file.read_text() + suites + own, "recipe.toml")
    events: list[dict[str, Any]] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ReplicaPool.start(recipe, recipe.model.name, {}))
        starting = pool.evaluators(recipe, recipe.model.name, events.append, lambda: True)
        evaluators = stack.enter_context(starting)
        while not evaluators.replicas:
            time.sleep(0.1)
        shape = pool.facts.shape
        unit = torch.full((shape.layers, shape.hidden), shape.hidden**-0.5)
        shared = pool.put(TrialSetup(Directions(unit, "ones", {})))
        (suite,), results = build_suites(recipe.suites, tmp_path), {}
        for name, kill in (("calm", False), ("killed", True)):
            results[name] = SuiteResults(tmp_path / name, recipe.suites)
            progress = Killing() if kill else SilentProgress()
            runner = SuiteRunner(evaluators, shared, results[name], progress)
            runner.measure(BASE_MODEL, (suite,), recipe.suites)
    calm, killed = (results[name].of(BASE, "asked") for name in ("calm", "killed"))
    assert calm.whole and killed.whole and len(killed.chunks) == 60
    assert suite.summary(killed.chunks) == suite.summary(calm.chunks)
    names = [event["event"] for event in events]
    assert names.count("replica-lost") == 1 and names.count("call-moved") <= AHEAD
    assert "evaluator 0" in next(e["replica"] for e in events if e["event"] == "replica-lost")


def replica_processes() -> list[psutil.Process]:
    """Processes of this test's own cluster: others on this machine may have replicas, too."""
    descendants = psutil.Process().children(recursive=True)
    return [p for p in descendants if "ray::ReplicaActor" in " ".join(p.cmdline()[:1])]


class Killing(SilentProgress):
    """Kills the evaluator once ten chunks are measured."""

    def step(self, done: int, total: int) -> None:
        if done == 10:
            max(replica_processes(), key=psutil.Process.create_time).kill()


def test_a_killed_evaluate_goes_on_to_the_same_totals(
    recipe_file: Path, tmp_path: Path, cluster: Any
) -> None:
    (tmp_path / "more.toml").write_text(asked(tmp_path, 150))
    recipe = Recipe.load(recipe_file, ("search.trials=1",))
    directory = RunDirectory.create(tmp_path / "run", recipe, recipe_file.read_text())
    run(recipe, directory, tmp_path)
    command = [sys.executable, "-m", "ray_abliterate", "evaluate", str(directory.path)]
    command += ["--suites", str(tmp_path / "more.toml")]
    settings = SuiteFile.load(tmp_path / "more.toml")
    (suite,) = build_suites(settings, tmp_path)
    results = directory.suite_results(settings)
    quietly: Any = {"cwd": tmp_path, "env": joining(cluster), "stdout": subprocess.DEVNULL}
    first = subprocess.Popen(command, **quietly)
    while not results.of(BASE, "asked").chunks and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = len(results.of(BASE, "asked").chunks)
    assert 0 < done < 150, "it was to be killed in the middle"
    subprocess.run(command, check=True, timeout=250, **quietly)
    resumed = results.of(BASE, "asked")
    undisturbed = measured_alone(recipe, directory, BASE_MODEL, settings, tmp_path)
    assert resumed.whole and undisturbed.whole
    assert suite.summary(resumed.chunks) == suite.summary(undisturbed.chunks)


@pytest.mark.parametrize("carry", ["none", "state"])
def test_a_reader_that_is_killed_costs_what_it_read_last(
    tmp_path: Path, cluster: Any, planted: Path, carry: str
) -> None:
    """By several replicas: independent chunks; by one: what has to be read in order."""
    model, text = tmp_path / "model", tmp_path / "text.npy"
    tiny_model("mamba2" if carry == "state" else "llama").save_pretrained(model)
    for file in (*planted.glob("token*"), *planted.glob("chat*")):
        shutil.copy(file, model / file.name)
    numpy.save(text, numpy.random.default_rng(0).integers(0, 60, 6000).astype(numpy.uint16))
    settings = ModelSettings(name="tiny", replicas=2, threads_per_replica=1, dtype="float32")
    reading = TextRequest(str(text), carry=carry, chunk_size=40)
    found, events = {}, list[dict[str, Any]]()
    with ReplicaPool.unedited(settings, str(model), events.append) as pool:
        while pool.replicas < 2:
            time.sleep(0.1)
        for name, progress in (("calm", SilentProgress()), ("killed", KillingAReader())):
            named = {"name": "tiny", "weights": pool.facts.fingerprint}
            evaluation = TextEvaluation(pool, None, tmp_path / name, progress)
            found[name] = evaluation.read(reading, (BASE_MODEL,), named)
    assert found["calm"].totals["base"].nats == found["killed"].totals["base"].nats
    assert found["calm"].totals["base"].chunks == len(found["killed"].chunks["base"])
    assert "replica-lost" in [event["event"] for event in events]
    lines = (tmp_path / "killed" / "base.chunks.jsonl").read_text().splitlines()
    assert len(lines) == len(found["killed"].chunks["base"])


class KillingAReader(SilentProgress):
    """Kills all replicas once some chunks are read."""

    def step(self, done: int, total: int) -> None:
        if done == 12:
            for process in replica_processes():
                process.kill()
