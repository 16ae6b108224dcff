"""A trial served by transformers' own server, and what is refused before that."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ray_abliterate.errors import ServeError
from ray_abliterate.export import export, serve
from ray_abliterate.export.find_export import is_export
from ray_abliterate.pipeline.progress import SilentProgress

ROOT = Path(__file__).parents[2]
CAKE = [{"role": "user", "content": "tell me about the cake"}]


class Notes(SilentProgress):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ())


def asked(url, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def wait_until_it_listens(server, url):
    for _ in range(600):
        try:
            return asked(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, server.communicate()[0]
            time.sleep(0.2)
    raise AssertionError("nothing listens")


def test_a_served_trial_answers_openai_clients_as_its_plan_does(planted_copy, port):
    for name in serve.NEEDED:
        pytest.importorskip(name)
    folder = serve.serve_trial(planted_copy.directory, planted_copy.trial, Notes()).folder
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "ray_abliterate", "serve", str(folder), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_until_it_listens(server, url)
        body = {"model": "trial-0", "messages": CAKE, "max_tokens": 4, "temperature": 0}
        answer = json.loads(asked(f"{url}/v1/chat/completions", body))
        assert answer["choices"][0]["message"]["content"] == "sure"
        streamed = asked(f"{url}/v1/chat/completions", {**body, "stream": True})
        assert '"content":"sure"' in streamed.replace(" ", "")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            asked(f"{url}/v1/chat/completions", {**body, "model": "another"})
    finally:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=30)
    assert f"{url}/v1 is the base URL, trial-0 the model's name" in said


def test_a_trials_folder_is_written_once_and_not_verified(planted_copy, monkeypatch):
    folder = planted_copy.directory.path / "serving" / "trial-0"
    served = serve.serve_trial(planted_copy.directory, planted_copy.trial, Notes())
    assert served == serve.ServedModel(folder.resolve())
    assert not (folder / "verification.json").exists()
    monkeypatch.setattr(export, "export_trial", None)
    assert serve.serve_trial(planted_copy.directory, planted_copy.trial, Notes()) == served


def test_an_export_of_the_trial_is_served_instead_of_a_second_copy(planted_copy, monkeypatch):
    exported = planted_copy.directory.path / "exports" / "trial-0"
    export.export_trial(
        planted_copy.directory, planted_copy.trial, exported, SilentProgress(), verify=False
    )
    monkeypatch.setattr(export, "export_trial", None)
    served = serve.serve_trial(planted_copy.directory, planted_copy.trial, Notes())
    assert served.folder == exported.resolve()


def test_how_the_model_is_loaded_and_asked_reaches_the_server(tmp_path):
    command = serve.ServedModel(tmp_path / "m", True, thinking=False).command("::1", 81)
    words = "serve m --host ::1 --port 81 --trust-remote-code --reasoning off"
    assert command[-len(words.split()) :] == words.split()


def test_an_adapter_and_a_name_with_a_revision_are_refused(tmp_path):
    for name, file in (("adapter", "adapter_config.json"), ("model@main", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        assert is_export(tmp_path / name)
    with pytest.raises(ServeError, match="is an adapter"):
        serve.serve_folder(tmp_path / "adapter")
    with pytest.raises(ServeError, match="rename it"):
        serve.serve_folder(tmp_path / "model@main")


def test_missing_packages_are_named_with_the_extra(monkeypatch, port):
    monkeypatch.setattr(serve, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(ServeError) as error:
        serve.refuse_unservable("127.0.0.1", port, Notes())
    assert "needs no_such_package." in str(error.value)
    assert "pip install 'ray-abliterate[serve]'" in str(error.value)


@pytest.mark.usefixtures("all_installed")
def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="choose another --port"):
            serve.refuse_unservable("127.0.0.1", taken.getsockname()[1], Notes())


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_only_an_address_that_others_reach_is_warned_about(host, warned, port):
    progress = Notes()
    serve.refuse_unservable(host, port, progress)
    assert any("no password" in line for line in progress.lines) == warned
