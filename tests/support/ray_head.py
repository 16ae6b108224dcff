"""A Ray head in processes of its own, with token authentication, as `ray start` makes it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "the-cluster-s-token-0a1b2c3d4e5f60718293a4b5c6d7e8f9"
PRIVATE = ("RAY_", "HF_", "HUGGING_FACE", "WANDB_")
"""Beginnings of variables that a test's processes do not inherit."""


@dataclass(frozen=True)
class Head:
    """A cluster of one node."""

    folder: Path
    """Ray's temporary folder: sessions, logs, copies of working folders."""
    address: str
    """Of the control store, for drivers."""
    dashboard: str
    """URL of dashboard and job server."""
    agent: str
    """URL of the node's agent, which takes jobs too."""
    metrics: str
    """URL of what Prometheus reads."""
    environment: Mapping[str, str]
    """Of the node's processes."""

    def get(self, path: str) -> str:
        """What the dashboard answers to somebody who has the token."""
        return fetch(self.dashboard + path, TOKEN)

    def job(self, name: str) -> dict[str, Any]:
        """What the job server knows about a job."""
        return dict(json.loads(self.get(f"/api/jobs/{name}")))

    def gauges(self) -> dict[str, float]:
        """Our metrics, by name without tags, as Prometheus would read them now."""
        lines = fetch(self.metrics).splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if line.startswith("ray_abliterate_")]
        return {name.partition("{")[0]: float(value) for name, value in samples}

    def client(self, **more: str) -> dict[str, str]:
        """Environment of somebody who uses the cluster from elsewhere."""
        mine = clean_environment()
        keep = ("PATH", "RAY_AUTH_TOKEN_PATH", "HOME", "OMP_NUM_THREADS")
        mine |= {name: self.environment[name] for name in keep if name in self.environment}
        return {**mine, "RAY_API_SERVER_ADDRESS": self.dashboard, **more}


def fetch(url: str, token: str | None = None, data: bytes | None = None) -> str:
    """GET, or POST if there is data."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def refusal(url: str, token: str | None = None, data: bytes | None = None) -> int:
    """The status of a request that has to be refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(url, token, data)
    return refused.value.code


def clean_environment() -> dict[str, str]:
    """This process's environment without what is meant for Ray or the Hub."""
    return {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE)}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextmanager
def ray_head(home: Path, secrets: Mapping[str, str]) -> Iterator[Head]:
    """Start a head, and end all of its processes after the block, whatever happened.

    Args:
        home: Home folder of its processes; holds the token, and the command line as it is
            installed on a node.
        secrets: Put into the environment of the node.
    """
    (home / "token").write_text(TOKEN)
    command = home / "bin" / "ray-abliterate"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ray_abliterate "$@"\n'
    )
    command.chmod(0o755)
    tools = f"{command.parent}{os.pathsep}{Path(sys.executable).parent}"
    environment = {
        **clean_environment(),
        "HOME": str(home),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_metrics_report_interval_ms": "1000",
        **secrets,
    }
    port, dashboard, agent, metrics = free_ports(4)
    with (
        tempfile.TemporaryDirectory(prefix="ra-", ignore_cleanup_errors=True) as folder,
        (home / "head.log").open("wb") as log,
    ):
        process = psutil.Popen(
            ["ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
             "--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1",
             "--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000",
             "--disable-usage-stats"],
            env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        head = Head(
            Path(folder), f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}",
            f"http://127.0.0.1:{agent}", f"http://127.0.0.1:{metrics}/metrics", environment,
        )  # fmt: skip
        try:
            _wait_for(head, process, home / "head.log")
            yield head
        finally:
            end(process, folder)


def _wait_for(head: Head, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            head.get("/api/jobs/")
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the head did not start:\n{log.read_text()}")


def end(process: psutil.Popen, folder: str) -> None:
    """End a process, its descendants, and whoever names the folder or got it from them."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.terminate()
        psutil.wait_procs([process], timeout=6)
        for other in {*family, *(p for p in psutil.process_iter() if _belongs(p, folder))}:
            with suppress(psutil.NoSuchProcess):
                other.kill()
    process.wait(10)


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return any(folder in word for word in process.cmdline())
    except psutil.Error:
        return False


class Watching(threading.Thread):
    """Notes the command lines of all processes while a `with` block runs, as `ps` shows them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.7):
            for process in psutil.process_iter():
                try:
                    self.seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    def __enter__(self) -> "Watching":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self.join()


def files_with(secret: str, *folders: Path) -> list[Path]:
    """All regular files below folders that hold a text."""
    found = []
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.is_symlink() and secret.encode() in file.read_bytes():
                found.append(file)
    return found


def wait_for_trials(directory: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Return when a run has so many trials."""
    deadline = time.monotonic() + 120
    file = directory / "trials.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= count:
            return
        time.sleep(0.1)
    pytest.fail(f"no {count} trials: {process.communicate(timeout=10)[0]}")
