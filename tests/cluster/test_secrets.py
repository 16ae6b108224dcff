"""Tokens reach the replicas, and nothing that anybody can read."""

import hashlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from ray_abliterate.cluster.secrets import Secrets, drivers_secrets
from ray_abliterate.pipeline.directory import RunDirectory
from tests.cluster.conftest import NODE_SECRETS
from tests.cluster.test_jobs import LISTINGS
from tests.conftest import RECIPE
from tests.support.ray_head import (
    ROOT,
    TOKEN,
    Head,
    Watching,
    clean_environment,
    end,
    fetch,
    files_with,
    refusal,
    wait_for_trials,
)

pytestmark = pytest.mark.ray

OURS = {
    "HF_TOKEN": "hf_DriversHubToken0123456789abcdefgh",
    "WANDB_API_KEY": "drivers-wandb-key-0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "drivers-aws-key-0123456789abcdef",
}
"""In the environment of the driver only."""

TELLTALE = '''
"""A scorer that tells whose token its process has, without telling the token."""

import hashlib
import os

from ray_abliterate.search.score import Score


class Telltale:
    def __init__(self, name: str, goal: str, expected: str) -> None:
        self.name, self.goal, self._expected = name, goal, expected

    def prepare(self, model) -> None: ...

    def score(self, model) -> Score:
        found = hashlib.sha256(os.environ.get("HF_TOKEN", "").encode()).hexdigest()
        return Score(self.name, float(found == self._expected), 0, 1, self.goal)
'''
SCORER = """
[[scorers]]
kind = "telltale:Telltale"
name = "token-is-here"
goal = "report"
options = {{ expected = "{}" }}
"""


def with_telltale(recipe_file: Path, planted: Path) -> None:
    """A recipe of few trials whose replicas tell whether they have the driver's token."""
    expected = hashlib.sha256(OURS["HF_TOKEN"].encode()).hexdigest()
    text = RECIPE.format(model=planted, replicas=1, trials=3)
    text = text.replace("[run]", SCORER.format(expected) + "\n[run]")
    recipe_file.write_text(text)
    (recipe_file.parent / "telltale.py").write_text(TELLTALE)


def run(folder: Path, to: Path, environment: Mapping[str, str]) -> "psutil.Popen":
    command = [sys.executable, "-m", "ray_abliterate", "run", "recipe.toml", "--to", str(to)]
    return psutil.Popen(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def had_the_token(to: Path) -> list[float]:
    trials = RunDirectory.open(to).trials()
    return [t.scorecard["token-is-here"].value for t in trials if t.scorecard is not None]


def test_no_text_of_secrets_shows_one_and_they_travel() -> None:
    secrets = Secrets({"HF_TOKEN": "hf_abc"})
    shown = [repr(secrets), str(secrets), f"{secrets}", f"{secrets!r:>40}", repr([secrets])]
    assert not [text for text in shown if "hf_abc" in text] and "HF_TOKEN" in shown[0]
    assert not hasattr(secrets, "__dict__")
    process = {"HF_TOKEN": "the node's", "PATH": "/bin"}
    pickle.loads(pickle.dumps(secrets)).hand_over(process)
    assert process == {"HF_TOKEN": "hf_abc", "PATH": "/bin"}
    Secrets().hand_over(process)
    assert process["HF_TOKEN"] == "hf_abc" and not Secrets()


def test_only_the_hub_token_travels_wherever_the_hub_library_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    carried: dict[str, str] = {}
    drivers_secrets().hand_over(carried)
    assert carried == {"HF_TOKEN": OURS["HF_TOKEN"]}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert not drivers_secrets()
    (tmp_path / "token").write_text("hf_of_the_file\n")
    drivers_secrets().hand_over(carried)
    assert carried == {"HF_TOKEN": "hf_of_the_file"}
    monkeypatch.setenv("JUDGE_KEY", "of a judge")
    drivers_secrets(["JUDGE_KEY", "NOT_SET"]).hand_over(carried)
    assert carried == {"HF_TOKEN": "hf_of_the_file", "JUDGE_KEY": "of a judge"}


def test_a_joined_clusters_replicas_get_the_drivers_token_and_nobody_sees_it(
    head: Head, recipe_file: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with_telltale(recipe_file, planted)
    to = tmp_path_factory.mktemp("joined") / "run"
    mine = head.client(RAY_ADDRESS=head.address, RAY_AUTH_MODE="token", **OURS)
    with Watching() as watching:
        driver = run(recipe_file.parent, to, mine)
        wait_for_trials(to, 1, driver)
        shown = {path: head.get(path) for path in LISTINGS}
        output = driver.communicate(timeout=120)[0]
    assert driver.returncode == 0, output
    assert had_the_token(to) == [1.0] * 3
    assert "replica-0" in shown["/api/v0/actors?detail=1"], "the listings were empty"
    for secret in (TOKEN, *OURS.values(), *NODE_SECRETS.values()):
        assert not files_with(secret, to, head.folder, recipe_file.parent)
        assert not [line for line in watching.seen if secret in line]
        assert not [path for path, text in shown.items() if secret in text]
        assert not [path for path in LISTINGS if secret in head.get(path)]
        assert secret not in output


LOCAL = """
import sys, ray
from ray_abliterate.cluster.connection import connect

print(connect(), flush=True)
ray.get(ray.remote(lambda: print("worked")).remote())
sys.stdin.read()
"""


def test_rays_own_dashboard_is_this_machines_wants_a_token_and_shows_no_secret(
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with tempfile.TemporaryDirectory(prefix="ra-", ignore_cleanup_errors=True) as folder:
        mine = {**clean_environment(), **OURS, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
                "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}  # fmt: skip
        driver = psutil.Popen(
            [sys.executable, "-c", LOCAL], env=mine, stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with Watching() as watching:
                said = driver.stdout.readline().strip()
                assert said == _listens(driver, "dashboard/dashboard.py"), said
                assert said.startswith("127.0.0.1:")
                assert refusal(f"http://{said}/api/jobs/") == 401
                shown = {path: fetch(f"http://{said}{path}", TOKEN) for path in LISTINGS}
                output = driver.communicate("", timeout=60)[0]
            assert driver.returncode == 0, output
            for secret in (TOKEN, *OURS.values()):
                assert not files_with(secret, Path(folder))
                assert not [line for line in watching.seen if secret in line]
                assert not [path for path, text in shown.items() if secret in text]
                assert secret not in output
        finally:
            end(driver, folder)


def _listens(driver: psutil.Popen, program: str) -> str:
    """Where one of a driver's children listens; Ray's processes each at one place or more."""
    (found,) = [
        f"{socket.laddr.ip}:{socket.laddr.port}"
        for process in driver.children(recursive=True)
        if any(program in word for word in process.cmdline())
        for socket in process.net_connections()
        if socket.status == psutil.CONN_LISTEN
    ]
    return found
