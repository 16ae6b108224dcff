"""The folder that an export is written in, beside its target. It outlives a killed process.

`.progress.json` in it says what is being exported, and holds size and hash of each finished file;
the same export takes these up again, another one starts afresh.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.errors import ExportError

PROGRESS = ".progress.json"
LOCK = ".lock"
CHUNK = 2**24
"""Bytes read at once."""


@dataclass
class Scratch:
    """An open scratch folder."""

    folder: Path
    identity: Mapping[str, Any]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)

    def finish(self, name: str, size: int, sha256: str) -> None:
        """Note that a file is complete; it must be on the disk."""
        self.finished[name] = {"bytes": size, "sha256": sha256}
        self.note()

    def note(self) -> None:
        """Write `.progress.json`."""
        text = json.dumps({"export": self.identity, "finished": self.finished}, indent=2)
        write_whole(self.folder / PROGRESS, text.encode())

    def holds(self, name: str) -> bool:
        """Whether a file was finished earlier, and is what it was then: its hash is computed."""
        noted, path = self.finished.get(name), self.folder / name
        if noted is None or not path.is_file() or path.stat().st_size != noted["bytes"]:
            return False
        return sha256_of(path) == str(noted["sha256"])


def give_name(folder: Path, name: Path) -> None:
    """A scratch folder is complete: rename it, without what was kept for a restart."""
    (folder / PROGRESS).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rename(name)


def scratch_name(to: Path) -> Path:
    """Where an export to `to` is written until it is complete."""
    return to.with_name(f".{to.name}.partial")


def finished_bytes(to: Path, identity: Mapping[str, Any]) -> int:
    """Bytes of files that an earlier attempt at the same export finished."""
    return sum(noted["bytes"] for noted in _finished(scratch_name(to), identity).values())


@contextmanager
def scratch(to: Path, identity: Mapping[str, Any]) -> Iterator[Scratch]:
    """A folder beside `to`: the earlier attempt's if it was at the same export, else a new one.

    It is kept if the block is left by an exception and a file was finished, for the next attempt.

    Raises:
        ExportError: the folder cannot be written, or another process is writing it.
    """
    folder = scratch_name(to)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
    except OSError as error:
        raise ExportError(
            f"{to.parent} cannot be written ({error.strerror}); choose another folder with --to."
        ) from None
    if not lock.is_locked:
        raise ExportError(f"another process is writing {to}; wait for it, or choose another --to.")
    work = Scratch(folder, identity, _finished(folder, identity))
    try:
        _clear(work)
        folder.chmod(0o755)
        yield work
    finally:
        lock.release()
        if folder.exists() and not work.finished:
            shutil.rmtree(folder, ignore_errors=True)


def _finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = found.get("export") == json.loads(json.dumps(identity))
    return dict(found["finished"]) if same else {}


def _clear(work: Scratch) -> None:
    """Remove everything but finished files."""
    for path in work.folder.iterdir():
        if path.name in work.finished or path.name in (LOCK, PROGRESS):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.note()


def sha256_of(path: Path) -> str:
    """Hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def on_disk(file: Any) -> None:
    """Wait until what was written has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
