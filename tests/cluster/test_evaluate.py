"""Suites on real replicas: after a search, and by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray_abliterate.measurements import BASE
from ray_abliterate.recipe import Recipe, SuiteFile
from ray_abliterate.run import run
from ray_abliterate.rundir import RunDirectory

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
    kept = directory.measurements(recipe.suites)
    assert set(kept.labels) == {BASE, *(f"trial-{t.number}" for t in frontier.members)}
    assert all(kept.of(model, "asked").whole for model in kept.labels)
    other = tmp_path / "more.toml"
    other.write_text(SUITES.replace('"asked"\n', '"again"\n').replace("tokens = 3", "tokens = 2"))
    command = [sys.executable, "-m", "ray_abliterate", "evaluate", str(directory.path)]
    trial = str(frontier.knee.number)
    done = subprocess.run(
        [*command, "--suites", str(other), "--trial", trial],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again" in done.stdout and f"trial-{trial}" in done.stdout and "1 [" in done.stdout
    more = directory.measurements(SuiteFile.load(other))
    assert more.labels == (BASE, f"trial-{trial}")
