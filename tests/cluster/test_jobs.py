"""A cluster as operators meet it: the launcher's files, jobs that stop and go on, refusals."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_abliterate.pipeline.directory import RunDirectory
from tests.cluster.conftest import NODE_SECRETS
from tests.conftest import RECIPE
from tests.support.ray_head import (
    ROOT,
    TOKEN,
    Head,
    Watching,
    fetch,
    files_with,
    refusal,
    wait_for_trials,
)

pytestmark = pytest.mark.ray

SUBMIT = str(ROOT / "scripts" / "submit.sh")
LISTINGS = (
    "/api/jobs/",
    "/api/v0/jobs?detail=1",
    "/api/v0/runtime_envs?detail=1",
    "/api/v0/actors?detail=1",
    "/api/v0/tasks?detail=1",
    "/api/v0/workers?detail=1",
    "/logical/actors",
)
"""What Ray's dashboard and `ray list` show."""


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_the_clusters_that_ship_are_what_rays_launcher_takes(name: str) -> None:
    prepared = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(prepared)
    (start,) = [line for line in prepared["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    everything = json.dumps(prepared)
    assert "RAY_AUTH_MODE=token" in everything and "~/.ray/auth_token" in prepared["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in everything and "HF_TOKEN=" not in everything


def submit(head: Head, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [SUBMIT, *arguments], env=head.client(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def wait_for_gauges(head: Head) -> dict[str, float]:
    """What Prometheus would read, once a window of the pool is full."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        gauges = head.gauges()
        if gauges.get("ray_abliterate_trials_per_hour", 0) > 0:
            return gauges
        time.sleep(0.5)
    pytest.fail(f"no trials per hour among {gauges}")


def test_a_job_that_is_stopped_goes_on_as_another_one_to_exactly_n_and_shows_no_secret(
    head: Head, recipe_file: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe_file.write_text(RECIPE.format(model=planted, replicas=1, trials=2000))
    folder, to = str(recipe_file.parent), tmp_path_factory.mktemp("runs") / "it's a run"
    with Watching() as watching:
        first = submit(head, "--id", "first", "run", str(recipe_file), "--to", str(to))
        wait_for_trials(to, 3, first)
        shown = {path: head.get(path) for path in LISTINGS}
        gauges = wait_for_gauges(head)
        stop, operator = ["ray", "job", "stop", "first"], head.client(RAY_AUTH_MODE="token")
        subprocess.run(stop, env=operator, check=True, capture_output=True, timeout=90)
        output = first.communicate(timeout=60)[0]
        assert head.job("first")["status"] == "STOPPED"
        assert "ray-abliterate resume" in output, "killed, not stopped"
        directory = RunDirectory.open(to)
        finished = {trial.number: trial for trial in directory.trials()}
        assert len(finished) >= 3
        wanted = len(finished) + 2
        more = ("--working-dir", folder, "resume", str(to), "--trials", str(wanted))
        second = submit(head, "--id", "second", *more)
        output += second.communicate(timeout=120)[0]
        assert second.returncode == 0, output
    after = {trial.number: trial for trial in directory.trials()}
    assert len(after) == wanted
    assert {number: after[number] for number in finished} == finished
    assert head.job("second")["status"] == "SUCCEEDED"
    assert head.job("first")["metadata"]["run_directory"] == str(to)
    for secret in (TOKEN, *NODE_SECRETS.values()):
        assert not files_with(secret, to, head.folder)
        assert not [line for line in watching.seen if secret in line]
        assert not [path for path, text in shown.items() if secret in text]
        assert secret not in output
        assert not [path for path in LISTINGS if secret in head.get(path)]
    assert any("ray-abliterate run" in line for line in watching.seen), "nothing was watched"
    assert gauges["ray_abliterate_trials_done_total"] >= 3
    assert gauges["ray_abliterate_replicas_ready"] == 1
    assert 0 < gauges["ray_abliterate_replica_busy_fraction"] <= 1
    assert 0 < gauges["ray_abliterate_hypervolume"] <= 1
    assert "behaviour.txt" not in shown["/api/jobs/"] and '"first"' in shown["/api/jobs/"]


def test_job_server_and_agent_refuse_requests_without_a_token(head: Head) -> None:
    job = json.dumps({"entrypoint": "true"}).encode()
    for url in (f"{head.dashboard}/api/jobs/", f"{head.agent}/api/job_agent/jobs/"):
        assert refusal(url, None, job) == 401
        assert refusal(url, "another-token", job) == 403
    assert refusal(f"{head.dashboard}/api/v0/actors") == 401
    assert json.loads(fetch(f"{head.dashboard}/api/jobs/", TOKEN)) is not None
    anonymous = {**head.client(), "RAY_AUTH_MODE": "disabled"}
    command = ["ray", "job", "submit", "--", "true"]
    done = subprocess.run(command, env=anonymous, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Unauthorized" in done.stdout + done.stderr


@pytest.fixture
def desk(tmp_path: Path) -> dict[str, str]:
    """Somebody's machine: a token, a recipe, and a `ray` that only writes down what it is given."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    (tmp_path / "my recipes").mkdir()
    (tmp_path / "my recipes" / "soup & bread.toml").write_text("")
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$RAY_AUTH_MODE" "$RAY_API_SERVER_ADDRESS" "$@"\n')
    ray.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}


def submitted(desk: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SUBMIT, *arguments], env=desk, cwd=desk["HOME"], capture_output=True, text=True, timeout=30
    )


def test_submit_passes_names_on_as_they_are(desk: dict[str, str]) -> None:
    recipe = "my recipes/soup & bread.toml"
    done = submitted(desk, "--no-wait", "run", recipe, "search.trials=3", "--to", '/runs/"a" $(b)')
    assert done.returncode == 0, done.stderr
    mode, address, *words = done.stdout.splitlines()
    assert (mode, address) == ("token", "http://127.0.0.1:8265")
    command = words[words.index("--") + 1 :]
    assert command == ["ray-abliterate", "run", "soup & bread.toml", "search.trials=3", "--to",
                       '/runs/"a" $(b)']  # fmt: skip
    assert words[words.index("--working-dir") + 1] == f"{desk['HOME']}/my recipes"
    metadata = json.loads(words[words.index("--metadata-json") + 1])
    assert metadata == {"verb": "run", "recipe": "soup & bread.toml",
                        "run_directory": '/runs/"a" $(b)'}  # fmt: skip
    environment = json.loads(words[words.index("--runtime-env-json") + 1])
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    assert TOKEN not in done.stdout
    resumed = submitted(
        {**desk, "RAY_ADDRESS": "http://there:1"}, "resume", "/runs/a", "--trials", "+5"
    )
    assert resumed.stdout.splitlines()[1] == "http://there:1"
    assert resumed.stdout.splitlines()[-4:] == ["resume", "/runs/a", "--trials", "+5"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "my recipes/soup & bread.toml", "--to", "runs/a"], "not an absolute path"),
        (["run", "my recipes/soup & bread.toml", "x=1"], "--to DIR is needed"),
        (["run", "no.toml", "--to", "/a"], "there is no recipe no.toml"),
        (["--working-dir", "/usr", "run", "my recipes/soup & bread.toml", "--to", "/a"], "not in"),
        (["resume", "/a", "hf_abcdefghijklmnopqrst"], "looks like a Hub token"),
        (["--quick", "resume", "/a"], "--quick is not an option"),
        (["--stop-wait", "soon", "resume", "/a"], "not a number"),
        (["resume"], "what is to be done?"),
    ],
)
def test_submit_refuses_what_would_go_wrong_later(
    desk: dict[str, str], arguments: list[str], reason: str
) -> None:
    done = submitted(desk, *arguments)
    assert done.returncode == 2 and reason in done.stderr and done.stdout == ""


def test_submit_needs_the_clusters_token(desk: dict[str, str]) -> None:
    nobody = submitted({**desk, "RAY_AUTH_TOKEN_PATH": "/none"}, "--help")
    assert nobody.returncode == 0 and "scripts/submit.sh" in nobody.stdout
    done = submitted({**desk, "RAY_AUTH_TOKEN_PATH": "/none"}, "resume", "/a")
    assert done.returncode == 2 and "no token in /none" in done.stderr
