"""Optuna's journal, held in memory and written in the background.

The study's file is read once. New entries are in memory at once, so that neither the sampler nor
Tune's loop waits for a disk, and go to the file in order. The run's lock makes this process the
only one that writes it.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock

Submit = Callable[[Callable[[], None]], None]


def write_in_foreground(work: Callable[[], None]) -> None:
    """Write before returning, in the calling thread."""
    work()


class MemoryJournal(BaseJournalBackend):  # type: ignore[misc]
    """The entries of one journal file, in memory."""

    def __init__(self, path: Path, submit: Submit = write_in_foreground) -> None:
        """Read the file, if it exists.

        Args:
            path: The file; created by the first write.
            submit: Runs each write, at once or in the background, in order.
        """
        self._path, self._submit = path, submit
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            self._entries = list(JournalFileBackend(str(path)).read_logs(0))

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind: the entries never leave this process."""
        return {}

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Return the entries from this number on."""
        return iter(self._entries[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries; they reach the disk when `submit` writes them."""
        lines = [json.dumps(entry, separators=(",", ":")) for entry in logs]
        self._entries += [json.loads(line) for line in lines]
        self._submit(partial(_append, self._path, lines))


def _append(path: Path, lines: Iterable[str]) -> None:
    """Add all lines, or none of them if the disk refuses."""
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if path.exists():
                os.truncate(path, before)
            raise
    finally:
        lock.release()
