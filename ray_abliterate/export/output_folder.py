"""The folder that an export is written to: whether it can take it, and the hidden folder before it.

Files are written into `.NAME.partial` beside the target, which is renamed once it is complete and
outlives a killed process. `.progress.json` in it says what is being exported, and holds size and
SHA-256 of each finished file: the same export resumes from these, another one starts afresh.
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

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import ExportError

PROGRESS = ".progress.json"
LOCK = ".lock"
SPARE = 1.1
"""Free disk space to ask for, as a multiple of what is written."""


def partial_path(to: Path) -> Path:
    """Return where an export to `to` is written until it is complete."""
    return to.with_name(f".{to.name}.partial")


def unverified_path(to: Path) -> Path:
    """Return where an export goes whose files do not score as the trial did."""
    return to.with_name(f"{to.name}.unverified")


# Whether the target can take an export


def refuse_unfit_target(to: Path, source: Path, size: float) -> None:
    """Make sure that an export of `size` bytes can be written to `to`.

    Args:
        to: The folder to write.
        source: The base model's folder.
        size: Bytes that are still to be written.

    Raises:
        ExportError: the folder is occupied, lies inside the base model's, or cannot be looked at;
            or the disk is too full.
    """
    try:
        _refuse_occupied(to)
        parent = next(folder for folder in to.parents if folder.exists())
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ExportError(
            f"{to} cannot be used ({error.strerror}); choose another folder with --to."
        ) from None
    if to.is_relative_to(source):
        raise ExportError(
            f"{to} lies inside the base model's folder; choose another folder with --to."
        )
    if free < SPARE * size:
        raise ExportError(
            f"the export needs {SPARE * size / 1e9:.2f} GB, but {parent} has "
            f"{free / 1e9:.2f} GB free.\n"
            "  Free some space, or choose a folder on another disk with --to."
        )


def _refuse_occupied(to: Path) -> None:
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ExportError(f"{to} exists and is not an empty folder; choose another one with --to.")
    if unverified_path(to).exists():
        raise ExportError(
            f"{unverified_path(to)} is left from an earlier export that failed verification; "
            "remove it first."
        )


# The partial folder


@dataclass
class PartialExport:
    """A partial folder that this process is writing.

    Attributes:
        folder: Where it is.
        identity: What is being exported, as JSON values; only the same export resumes.
        finished: Size and SHA-256 of each complete file, by name.
    """

    folder: Path
    identity: Mapping[str, Any]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)

    def record_finished(self, name: str, size: int, sha256: str) -> None:
        """Record that a file is complete. Its bytes must have reached the disk."""
        self.finished[name] = {"bytes": size, "sha256": sha256}
        self.save_progress()

    def save_progress(self) -> None:
        """Write `.progress.json`, whole, for an attempt that resumes."""
        text = json.dumps({"export": self.identity, "finished": self.finished}, indent=2)
        write_atomically(self.folder / PROGRESS, text.encode())

    def has_intact(self, name: str) -> bool:
        """Return whether a file was finished earlier and still has the SHA-256 of then."""
        record, path = self.finished.get(name), self.folder / name
        if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        return file_sha256(path) == str(record["sha256"])


@contextmanager
def open_partial(to: Path, identity: Mapping[str, Any]) -> Iterator[PartialExport]:
    """Open the partial folder beside `to`, resuming an earlier attempt at the same export.

    The folder stays for the next attempt if the block raises after a file was finished.

    Raises:
        ExportError: the folder cannot be written, or another process is writing it.
    """
    folder = partial_path(to)
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
    partial = PartialExport(folder, identity, _read_finished(folder, identity))
    try:
        _remove_unfinished(partial)
        folder.chmod(0o755)
        yield partial
    finally:
        lock.release()
        if folder.exists() and not partial.finished:
            shutil.rmtree(folder, ignore_errors=True)


def rename_complete(folder: Path, name: Path) -> None:
    """Give a complete partial folder its final name, without the files that resuming needs."""
    (folder / PROGRESS).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rename(name)


def finished_bytes(to: Path, identity: Mapping[str, Any]) -> int:
    """Return the size of the files that an earlier attempt at the same export finished."""
    return sum(record["bytes"] for record in _read_finished(partial_path(to), identity).values())


def _read_finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    # through JSON and back, which makes lists of tuples
    same = progress.get("export") == json.loads(json.dumps(identity))
    return dict(progress["finished"]) if same else {}


def _remove_unfinished(partial: PartialExport) -> None:
    for path in partial.folder.iterdir():
        if path.name in partial.finished or path.name in (LOCK, PROGRESS):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial.save_progress()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(file: Any) -> None:
    """Wait until all that was written to an open file has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
