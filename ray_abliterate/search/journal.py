"""Optuna's journal, held in memory and written in the background.

The study's file is read once. What is added is in memory at once, so that neither the sampler nor
Tune's loop waits for a disk, and goes to the file in order. The run's lock makes us its author.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock

Submit = Callable[[Callable[[], None]], None]


def at_once(work: Callable[[], None]) -> None:
    """Write in the foreground."""
    work()


class MemoryJournal(BaseJournalBackend):  # type: ignore[misc]
    """The lines of one journal file."""

    def __init__(self, path: Path, submit: Submit = at_once) -> None:
        """Read what is there.

        Args:
            path: The file; made when there is something to write.
            submit: Takes each write.
        """
        self._path, self._submit = path, submit
        self._lines: list[dict[str, Any]] = []
        if path.exists():
            self._lines = list(JournalFileBackend(str(path)).read_logs(0))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing leaves this process."""
        return {}

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Entries from a number on."""
        return iter(self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries; they are on the disk a little later."""
        lines = [json.dumps(entry, separators=(",", ":")) for entry in logs]
        self._lines += [json.loads(line) for line in lines]
        self._submit(partial(_append, self._path, lines))


def _append(path: Path, lines: Iterable[str]) -> None:
    """Add lines whole, or none of them."""
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
