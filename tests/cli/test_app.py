"""The command line as a person meets it: help, recipes that ship, and wrong inputs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import ray
from typer.testing import CliRunner

from ray_abliterate.cli.app import app, run_command
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard
from tests.conftest import RECIPE

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


def process(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ray_abliterate", *arguments], cwd=folder, text=True,
        capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )  # fmt: skip


def command(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported all there is; an exception is one here too."""
    out, err, code = StringIO(), StringIO(), 0
    with (
        chdir(folder), redirect_stdout(out), redirect_stderr(err), open(os.devnull) as nothing,
        patch.object(sys, "stdin", nothing), patch.dict(os.environ, COLUMNS="120"),
    ):  # fmt: skip
        try:
            run_command(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(*arguments: str, folder: Path, by: Command = command) -> str:
    """The one clear error of a command that can't be carried out: exit code 2, no traceback."""
    done = by(*arguments, folder=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def a_run(folder: Path, recipe: Recipe, trials: int = 2) -> RunDirectory:
    """A run directory with trials that nobody ran."""
    directory = RunDirectory.create(folder, recipe, "")
    for number in range(trials):
        rate = 0.5 / (number + 1)
        scores = (
            Score("keyword-rate", rate, 0, 1, detail={"hits": 1, "total": 2}),
            Score("kl-divergence", 0.1 * (number + 1), 0, 1, unit="nats per token"),
        )
        plan = Plan.from_params(
            {"direction_scope": "global", "direction_layer": 2.0, "attn.peak": 1.0 + number,
             "attn.peak_layer": 2.0, "attn.floor": 0.5, "attn.reach": 1.5}, "none",
        )  # fmt: skip
        directory.append_trial(Trial(number, plan, Scorecard(scores), 1.0))
    card = Scorecard((Score("keyword-rate", 1, 0, 1), Score("kl-divergence", 0, 0, 0)))
    directory.save_baseline(Baseline(card, (), 2))
    directory.record_facts(
        model={"layers": 4, "hidden": 32, "components": ["attn"]}, base=str(folder)
    )
    return directory


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['ray-abliterate', '--help']\n"
        "try:\n    runpy.run_module('ray_abliterate', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'optuna', 'numpy', 'plotly', 'pyarrow'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    verbs = "init doctor run resume show directions residuals evaluate report export push reproduce"
    for verb in [*verbs.split(), "import-heretic", "chat", "serve"]:
        assert verb in done.stdout
    times = []
    for _ in range(3):
        started = time.perf_counter()
        command("--help")
        times.append(time.perf_counter() - started)
    assert min(times) < 2.0  # below 1 s on an idle machine; the imports above are what matters


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_recipe_that_ships_loads(file: Path) -> None:
    recipe = Recipe.load(file)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(tmp_path: Path) -> None:
    done = command("init", "my.toml", "--model", "some/model", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Recipe.load(tmp_path / "my.toml").model.name == "some/model"
    before = (tmp_path / "my.toml").read_bytes()
    assert "already exists" in refused("init", "my.toml", folder=tmp_path)
    assert (tmp_path / "my.toml").read_bytes() == before
    assert "--like takes one of" in refused("init", "x.toml", "--like", "nothing", folder=tmp_path)


def test_a_recipe_that_is_missing_or_wrong_is_one_clear_error(tmp_path: Path) -> None:
    missing = refused("run", "missing.toml", folder=tmp_path, by=process)
    assert "ray-abliterate init missing.toml" in missing
    (tmp_path / "broken.toml").write_text("[model\n")
    assert "broken.toml is not TOML" in refused("run", "broken.toml", folder=tmp_path)
    text = RECIPE.format(model="planted", replicas=1, trials=3)
    (tmp_path / "typo.toml").write_text(text.replace("trials =", "trails ="))
    error = refused("run", "typo.toml", folder=tmp_path)
    assert "search.trails is not a setting. Did you mean search.trials?" in error
    (tmp_path / "slice.toml").write_text(text.replace("behaviour.txt", 'b.txt", split = "[9:3]'))
    assert "selects nothing" in refused("run", "slice.toml", folder=tmp_path)
    assert "is not an override" in refused("run", "typo.toml", "oops", folder=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_prompts_that_are_missing_are_named_before_any_model_is_loaded(
    recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "neutral.txt").unlink()
    error = refused("run", "recipe.toml", "model.name=/no/such/model", folder=tmp_path)
    assert "neutral" in error and "neutral.txt" in error
    (tmp_path / "neutral.csv").write_text("text\nwhy\nhow\n")
    text = recipe_file.read_text().replace("neutral.txt", 'neutral.csv", column = "texts')
    recipe_file.write_text(text)
    error = refused("run", "recipe.toml", "--to", "other", folder=tmp_path)
    assert "texts" in error and "text" in error


NO_MODELS = {
    "./nowhere": "no such folder",
    "/no/such/model": "no such folder",
    "one/folder/too-many": "no such folder",
    "recipe.toml": "is a file",
    "empty": "no config.json",
    "adapter": "merged into",
    "quantized": "GGUF",
}


def test_a_model_that_is_not_there_is_refused_before_ray_is_started(
    recipe_file: Path, tmp_path: Path
) -> None:
    """All in one folder: a run that has had no model is in nobody's way."""
    for folder, file in (("empty", "notes"), ("adapter", "adapter_config.json"),
                         ("quantized", "model.Q4.gguf")):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    for name, found in NO_MODELS.items():
        error = refused("run", "recipe.toml", f"model.name={name}", folder=tmp_path)
        assert f"model.name = '{name}'" in error and found in error
        assert "Give " in error or "give " in error
        assert not ray.is_initialized()


def test_models_to_evaluate_that_are_not_there_are_refused_before_any_is_read(
    planted: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a road of stars")
    reading = ("--text", "text.txt")
    error = refused("evaluate", "./nowhere", *reading, folder=tmp_path)
    assert "MODEL = './nowhere': there is no such folder" in error
    error = refused("evaluate", "./nowhere", "--compare", str(planted), *reading, folder=tmp_path)
    assert "MODEL = './nowhere': there is no such folder" in error
    error = refused("evaluate", str(planted), "--compare", "./nowhere", *reading, folder=tmp_path)
    assert "--compare = './nowhere': there is no such folder" in error
    assert not ray.is_initialized() and not (tmp_path / "evaluation").exists()


def test_a_run_folder_that_holds_a_run_names_resume(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    a_run(tmp_path / "runs" / "recipe", recipe)
    error = refused("run", "recipe.toml", folder=tmp_path)
    assert "already holds 2 of 6 trials" in error
    assert "ray-abliterate resume runs/recipe" in error


def test_a_folder_that_cannot_be_written_is_named(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    error = refused("run", "recipe.toml", "--to", "file/run", folder=tmp_path)
    assert "cannot be written" in error and "--to" in error


@pytest.mark.parametrize("verb", ["resume", "show", "report", "residuals"])
def test_a_run_that_is_not_there_is_named(verb: str, tmp_path: Path) -> None:
    assert "holds no run" in refused(verb, "nowhere", folder=tmp_path)


def test_a_trial_that_is_not_there_names_those_on_the_frontier(
    recipe: Recipe, tmp_path: Path
) -> None:
    a_run(tmp_path / "run", recipe)
    for verb in (["show"], ["chat"], ["export", "--to", "out"]):
        error = refused(verb[0], "run", "--trial", "99", *verb[1:], folder=tmp_path)
        assert "has no trial 99 (it has 0 to 1)" in error
        assert "On the frontier: " in error
    assert not (tmp_path / "out").exists()


def test_a_changed_recipe_is_refused_with_the_difference(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    a_run(tmp_path / "run", recipe)
    recipe_file.write_text(recipe_file.read_text().replace('norm = "none"', 'norm = "row"'))
    error = refused("resume", "run", "--recipe", "recipe.toml", folder=tmp_path)
    assert '-    "norm": "none"' in error and '+    "norm": "row"' in error


def test_a_number_of_trials_that_makes_no_sense_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    a_run(tmp_path / "run", recipe)
    assert "not a number of trials" in refused("resume", "run", "--trials", "many", folder=tmp_path)
    assert "already has 2 trials" in refused("resume", "run", "--trials", "1", folder=tmp_path)


def test_show_lists_the_frontier_beside_the_base_model_and_one_trial_with_its_plan(
    recipe: Recipe, tmp_path: Path
) -> None:
    a_run(tmp_path / "run", recipe)
    listed = command("show", "run", folder=tmp_path).stdout
    assert "2 of 6 trials" in listed and "base" in listed and "◆" in listed
    one = command("show", "run", "--trial", "1", folder=tmp_path).stdout
    assert "taken at layer 2.00" in one and "attn" in one and "base model" in one
    missing = refused("show", "run", "--trial", "1", "--responses", folder=tmp_path)
    assert "record_responses" in missing


def test_a_chat_that_cannot_be_had_is_refused_before_a_model_is_loaded(tmp_path, recipe) -> None:
    a_run(tmp_path / "run", recipe)
    both = refused("chat", "run", "--compare", "--blind", folder=tmp_path)
    assert "choose one of the two" in both
    (tmp_path / "said.jsonl").write_text("mine")
    taken = refused("chat", "run", "--trial", "0", "--save", "said.jsonl", folder=tmp_path)
    assert "said.jsonl already exists" in taken


def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path, recipe) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refused("serve", "run", "--port", port, folder=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    trial = refused("serve", "mine", "--trial", "1", folder=tmp_path)
    assert "is an export, not a run" in trial
    assert f"port {port}" in error or "pip install 'ray-abliterate[serve]'" in error


def test_a_bounded_trial_is_told_apart_and_its_export_names_the_better_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    directory = a_run(tmp_path / "run", recipe)
    scores = (
        Score("keyword-rate", 0.75, 0.75, 1, detail={"hits": 3, "total": 4}, bound=True),
        Score("kl-divergence", 0.4, 0, 1, unit="nats per token"),
    )
    directory.append_trial(Trial(2, directory.trial(0).plan, Scorecard(scores), 0.5))
    assert (
        "3 of 6 trials, 1 stopped early, 0 failed" in command("show", "run", folder=tmp_path).stdout
    )
    one = command("show", "run", "--trial", "2", folder=tmp_path).stdout
    assert "≥ 0.75 3/4" in one and "trial 1 is better whatever its remaining scores" in one
    assert "ray-abliterate chat run --trial 2" in one and "export" not in one
    error = refused("export", "run", "--trial", "2", "--to", "out", folder=tmp_path)
    assert "trial 2 was stopped early" in error and "--no-verify" in error
    assert f"ray-abliterate export run --trial 1 --to {tmp_path / 'out'}" in error


def test_report_is_one_file(recipe: Recipe, tmp_path: Path) -> None:
    a_run(tmp_path / "run", recipe)
    done = command("report", "run", folder=tmp_path)
    assert done.stdout.strip().endswith("report.html")
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000


def test_an_upload_says_what_it_lacks_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (folder / name).write_text("{}")
    assert "--unverified" in refused("push", "export", "--to", "a/b", folder=tmp_path)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused("reproduce", "reproduce.json", "--to", "out", folder=tmp_path)
    assert "reproduce.json is not there" in error


def test_a_study_of_heretics_becomes_a_run_that_shows_its_scores_as_its_own(
    tmp_path: Path,
) -> None:
    journal = ROOT / "tests" / "support" / "heretic" / "heretic-1.4.jsonl"
    assert "behaviour.txt does not exist" in refused(
        "import-heretic", str(journal), folder=tmp_path
    )
    for name in ("behaviour", "neutral"):
        (tmp_path / f"{name}.txt").write_text("a prompt\n")
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32,
              "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = command(
        "import-heretic", str(journal), "--to", "run", "--model", "model", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "5 plans wait in run" in done.stdout and "ray-abliterate resume run" in done.stdout
    shown = command("show", "run", folder=tmp_path).stdout
    assert "0 of 5 trials" in shown and "As scored by Heretic 1.4, not by this run" in shown


def test_a_form_of_export_that_is_none_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    a_run(tmp_path / "run", recipe)
    for options, words in (
        (["--as", "gguf"], "--as 'gguf': expected one of merged, adapter"),
        (["--shard-size", "5"], "--shard-size '5' is not a size; write 5GB"),
        (["--as", "adapter", "--shard-size", "5GB"], "--shard-size is for whole models"),
        (["--adapter-error", "2"], "--adapter-error 2.0 must be at least 0"),
    ):
        assert words in refused("export", "run", "--to", "out", *options, folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_directions_and_residuals_say_what_is_missing_before_a_model_is_loaded(
    recipe: Recipe, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(Path("run"), recipe)
    for arguments, said in (
        (["directions", "run"], "ray-abliterate resume run"),
        (["residuals", "run"], "ray-abliterate resume run"),
        (["residuals", "run", "--trial", "99"], "has no trial 99"),
        (["directions", "."], "holds no run"),
        (["directions", "run", "search.trials=3"], "search.trials=3 changes a recipe"),
        (["directions", "recipe.toml", "--method", "whitend"], "--method whitend: 'whitend' is"),
        (["directions", "nothing.toml"], "ray-abliterate init nothing.toml"),
        (["directions", "recipe.toml", "--to", "recipe.toml/x"], "cannot be written"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, RayAbliterateError), (arguments, done.exception)
        assert said in str(done.exception)
    assert not Path("runs").exists()


def test_directions_and_residuals_of_a_run_leave_a_page_each(
    recipe: Recipe, tmp_path: Path
) -> None:
    directory = a_run(tmp_path / "run", recipe)
    facts = {}
    for name, shift in (("behaviour", 1.0), ("neutral", 0.0)):
        values = numpy.random.default_rng(0).standard_normal((16, 4, 32)).astype(numpy.float32)
        values[:, 2:, 5] += 8 * shift
        directory.shards.path.mkdir(exist_ok=True)
        shard = ResidualShard.of(name, 0, values).to_file(name)
        directory.shards.file(name, 0).write_bytes(shard)
        facts[name] = {"key": name, "shards": 1}
    directory.record_facts(residuals=facts)
    done = command(
        "directions", "run", "--method", "mean-difference", "--method", "inlp", "--pairs", "2",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Take mean-difference" in done.stdout and "inlp" in done.stdout
    assert (tmp_path / "run" / "directions.html").stat().st_size > 100_000
    done = command("residuals", "run", "--to", "pictures", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "separates the sets best" in done.stdout
    assert (tmp_path / "pictures" / "residuals.html").stat().st_size > 100_000
