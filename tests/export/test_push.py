"""Uploads with the Hub's real client, to a Hub on this machine that fails on purpose."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from ray_abliterate.errors import PushError
from ray_abliterate.export import push as pushing
from ray_abliterate.export.push import upload_export, uploaded_files
from ray_abliterate.pipeline.progress import SilentProgress
from tests.support.hub_server import TOKEN, Hub, Request, serving

ROOT = Path(__file__).parents[2]
NAME = "somebody/some-model"


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export in three files, with random bytes for weights."""
    place = tmp_path / "export"
    (place / "reproduce").mkdir(parents=True)
    for number in (1, 2, 3):
        (place / f"model-{number}.safetensors").write_bytes(os.urandom(200_000 + number))
    (place / "reproduce" / "directions.safetensors").write_bytes(os.urandom(500))
    for name in ("config.json", "reproduce/reproduce.json", "[odd] *name?.txt"):
        (place / name).write_text("{}")
    (place / "README.md").write_text("---\nbase_model: a/b\n---\n# Card\n")
    (place / "verification.json").write_text('{"scores": [{"name": "s", "within": true}]}')
    (place / ".hidden").write_text("not for others")
    return place


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub, and the client set to it; waits are noted and not waited."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(pushing, "FIRST_DELAY", 0.01)
        server.waits = []
        monkeypatch.setattr("huggingface_hub.utils._http.time", Clock(server.waits))
        yield server
        huggingface_hub.close_session()


class Clock:
    """`time`, as far as the client's waits go."""

    def __init__(self, waits: list[float]) -> None:
        self._waits = waits

    def sleep(self, seconds: float) -> None:
        self._waits.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def large(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that go apart, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.safetensors")
    }


def whole(hub: Hub, folder: Path) -> bool:
    """Whether the Hub has what the folder has."""
    small = {name: (folder / name).read_bytes() for name in uploaded_files(folder)}
    return hub.committed == large(folder) and hub.files == {
        name: data for name, data in small.items() if name not in hub.committed
    }


def test_all_files_but_hidden_ones_arrive_and_the_model_is_private(hub, folder):
    progress = Notes()
    revision = upload_export(folder, NAME, progress)
    assert revision == f"{1:040x}" and hub.commits == 1
    assert hub.private == {NAME: True}
    assert whole(hub, folder)
    assert ".hidden" not in hub.files and "[odd] *name?.txt" in hub.files
    assert set(hub.sent.values()) == {1}
    assert any("9 files" in note and NAME in note for note in progress.notes)


def test_public_is_public(hub, folder):
    upload_export(folder, NAME, SilentProgress(), public=True)
    assert hub.private == {NAME: False}


def test_the_same_again_sends_nothing(hub, folder):
    upload_export(folder, NAME, SilentProgress())
    asked = len(hub.asked)
    upload_export(folder, NAME, SilentProgress())
    assert set(hub.sent.values()) == {1} and hub.commits == 1
    assert not any(line.startswith("PUT") or "/commit/" in line for line in hub.asked[asked:])
    (folder / "README.md").write_text("---\nbase_model: a/b\n---\n# Another card\n")
    upload_export(folder, NAME, SilentProgress())
    assert hub.commits == 2 and whole(hub, folder) and set(hub.sent.values()) == {1}


# Faults


@pytest.mark.parametrize(
    "where",
    ["POST /api/repos/create", "GET /api/models/", "POST /api/validate-yaml", "POST /preupload/",
     "POST /objects/batch", "PUT /large/", "POST /verify", "POST /commit/"],
)  # fmt: skip
@pytest.mark.parametrize("fault", ["dropped", "500", "429"])
def test_a_fault_at_any_request_is_overcome(hub, folder, where, fault):
    answers = {
        "dropped": Request.drop,
        "500": lambda request: request.answer(500, {"error": "oops"}),
        "429": lambda request: request.answer(429, {"error": "slow down"}, Retry_After="7"),
    }
    hub.once(where, answers[fault])
    upload_export(folder, NAME, SilentProgress())
    assert whole(hub, folder)
    assert set(hub.sent.values()) == {1}
    method, _, part = where.partition(" ")
    assert sum(line.startswith(method) and part in line for line in hub.asked) >= 2


def test_the_hubs_wish_for_patience_is_followed(hub, folder):
    hub.once("PUT /large/", lambda request: request.answer(429, Retry_After="7"), times=2)
    progress = Notes()
    upload_export(folder, NAME, progress)
    assert hub.waits.count(8.0) == 2  # the client adds a second
    assert any("Waiting 8.0s" in note for note in progress.notes)
    told = "\n".join(progress.notes)
    assert "secret-" not in told and TOKEN not in told


def test_what_has_arrived_is_not_sent_again_after_a_long_outage(hub, folder):
    names = large(folder)
    lost = names["model-3.safetensors"]
    hub.once(f"PUT /large/{lost}", Request.drop, times=1000)
    with pytest.raises(PushError, match=r"not uploaded completely(?s:.*)same command again"):
        upload_export(folder, NAME, SilentProgress())
    assert hub.commits == 0 and lost not in hub.sent
    assert set(hub.sent) == set(names.values()) - {lost}
    hub.faults.clear()
    upload_export(folder, NAME, SilentProgress())
    assert whole(hub, folder) and set(hub.sent.values()) == {1}


def test_an_outage_that_the_client_gives_up_on_is_waited_for(hub, folder):
    lost = large(folder)["model-3.safetensors"]
    hub.once(f"PUT /large/{lost}", Request.drop, times=8)  # the client tries 6 times
    upload_export(folder, NAME, SilentProgress())
    assert whole(hub, folder) and set(hub.sent.values()) == {1}


def test_ctrl_c_says_how_to_go_on(hub, folder):
    def interrupt(request: Request) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        request.drop()

    hub.once("POST /commit/", interrupt)
    progress = Notes()
    with pytest.raises(KeyboardInterrupt):
        upload_export(folder, NAME, progress)
    assert "same command again" in progress.notes[-1] and hub.commits == 0
    upload_export(folder, NAME, progress)
    assert whole(hub, folder) and set(hub.sent.values()) == {1}


def test_a_push_that_was_killed_resumes(hub, folder, tmp_path):
    """The whole command, in a process of its own; nothing of the token is shown."""
    names = large(folder)
    held, release = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        held.set()
        release.wait(60)
        request.drop()

    hub.once(f"PUT /large/{names['model-2.safetensors']}", hold)
    command = [sys.executable, "-m", "ray_abliterate", "push", str(folder), "--to", NAME]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    first = subprocess.Popen(command, env=environment, cwd=tmp_path)
    try:
        assert held.wait(60)
        deadline = time.monotonic() + 30
        while len(hub.sent) < len(names) - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        release.set()
    assert len(hub.sent) == len(names) - 1 and hub.commits == 0
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert whole(hub, folder) and set(hub.sent.values()) == {1}
    assert f"revision {1:040x}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert "%|" not in done.stderr  # bars are for terminals


# The Xet store, which the client uses unless told


def by_command(hub: Hub, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, with a cache of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ray_abliterate", "push", str(folder), "--to", NAME],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
             "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "0", **environment},
        cwd=folder.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def arrived(hub: Hub, folder: Path) -> bool:
    """Whether the Xet store has the first chunk of every large file, and the commit names them."""
    firsts = [(folder / name).read_bytes()[:400] for name in large(folder)]
    store = b"".join(hub.xorbs.values())
    return hub.committed == large(folder) and all(first in store for first in firsts)


def test_xet_takes_the_files_in_spite_of_faults_and_takes_them_once(hub, folder):
    pytest.importorskip("hf_xet")
    hub.once("POST /cas/v1/xorbs/", lambda request: request.answer(500))
    hub.once("POST /cas/v1/shards", Request.drop)
    hub.once("GET /xet-write-token/", lambda request: request.answer(429, Retry_After="1"))
    hub.once("POST /commit/", lambda request: request.answer(401, {"error": "expired"}))
    first = by_command(hub, folder)
    assert first.returncode == 2 and "hf auth login" in first.stderr, first.stdout + first.stderr
    assert hub.commits == 0 and set(hub.sent.values()) == {1}
    second = by_command(hub, folder)
    assert second.returncode == 0, second.stdout + second.stderr
    assert arrived(hub, folder) and hub.private == {NAME: True} and hub.commits == 1
    assert set(hub.sent.values()) == {1}
    assert all(TOKEN not in text for text in (first.stdout, first.stderr, second.stdout))


# Refusals of the Hub


def test_an_expired_token_is_named_and_not_shown(hub, folder):
    hub.token = "hf_" + "y" * 34
    with pytest.raises(PushError, match=r"expired(?s:.*)hf auth login") as caught:
        upload_export(folder, NAME, SilentProgress())
    assert TOKEN not in str(caught.value) and not hub.sent


def test_a_token_that_expires_in_the_midst_is_named(hub, folder):
    hub.once("POST /commit/", lambda request: request.answer(401, {"error": "expired"}))
    with pytest.raises(PushError, match="expired"):
        upload_export(folder, NAME, SilentProgress())
    upload_export(folder, NAME, SilentProgress())
    assert whole(hub, folder) and set(hub.sent.values()) == {1}


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, r"write to somebody \(it says: no way"), (402, "it says: no way"),
     (404, "no user or organisation somebody"), (429, "too many requests")],
)  # fmt: skip
def test_what_the_hub_refuses_is_explained_with_the_next_step(hub, folder, status, words):
    hub.once("POST /api/repos/create", lambda r: r.answer(status, {"error": "no way"}), times=1000)
    hub.once("GET /api/models/", lambda r: r.answer(status, {"error": "no"}), times=1000)
    with pytest.raises(PushError, match=words):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.sent


def test_without_a_token_the_error_says_how_to_get_one(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(PushError, match="hf auth login"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.asked


def test_a_model_that_is_public_already_is_not_taken_for_private(hub, folder):
    hub.private[NAME] = False
    with pytest.raises(PushError, match="everybody can read it"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.sent


def test_a_model_with_other_weights_is_left_alone(hub, folder):
    hub.private[NAME], hub.committed["model-9.safetensors"] = True, "0" * 64
    with pytest.raises(PushError, match=r"other weights \(model-9"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.sent


# Refusals before the Hub is asked


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "a b/c", "-a/b", "a/b--c", "a/..", "a/b.git", "a/" + "b" * 96, ""]
)
def test_a_name_that_cannot_be_is_refused(hub, folder, name):
    with pytest.raises(PushError, match="Write USER/NAME"):
        upload_export(folder, name, SilentProgress())
    assert not hub.asked


def test_an_unverified_export_needs_to_be_asked_for(hub, folder):
    file = folder / "verification.json"
    file.write_text('{"scores": [{"name": "kl", "within": false}]}')
    with pytest.raises(PushError, match=r"does not score as its trial did \(kl\)"):
        upload_export(folder, NAME, SilentProgress(), unverified=True)
    file.write_text("{")
    with pytest.raises(PushError, match="damaged"):
        upload_export(folder, NAME, SilentProgress())
    file.unlink()
    with pytest.raises(PushError, match=r"was not verified(?s:.*)--unverified"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.asked
    upload_export(folder, NAME, SilentProgress(), unverified=True)
    assert whole(hub, folder)


@pytest.mark.parametrize(
    "name", ["responses/000001.parquet", "trials.jsonl", "sub/recipe.toml", "my-transcript.txt"]
)
def test_prompts_and_answers_need_to_be_asked_for(hub, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("private")
    with pytest.raises(PushError, match=r"--with-responses"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.asked
    upload_export(folder, NAME, SilentProgress(), with_responses=True)
    assert whole(hub, folder) and name in hub.files


def test_a_folder_that_is_no_export_is_refused(hub, folder):
    for name, words in (
        ("README.md", "no model card"),
        ("config.json", "neither a run nor an export"),
    ):
        (folder / name).rename(folder / "away")
        with pytest.raises(PushError, match=words):
            upload_export(folder, NAME, SilentProgress())
        (folder / "away").rename(folder / name)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PushError, match="no safetensors"):
        upload_export(folder, NAME, SilentProgress())
    assert not hub.asked


def test_an_adapter_names_a_base_model_that_others_have(hub, folder):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "/home/somebody/model"}))
    with pytest.raises(PushError, match="which nobody else has"):
        upload_export(folder, NAME, SilentProgress())
    config.write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    upload_export(folder, NAME, SilentProgress())
    assert whole(hub, folder)
