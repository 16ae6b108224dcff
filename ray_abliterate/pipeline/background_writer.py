"""Writes files in the background, so that a slow or full disk stalls no computation.

One thread writes everything in the order of its submission. While the disk refuses, results wait in
memory and are tried again; they are lost only if it still refuses after the end.
"""

import queue
import threading
import time
from collections.abc import Callable

from ray_abliterate.errors import RunDirectoryError

Write = Callable[[], None]
Notify = Callable[..., None]
"""Receives the name of an event, and details as keywords."""

MOST_WAITING = 10_000
"""Writes that may wait; a further `submit` blocks."""
RETRY_SECONDS = 2.0
SLOW_SECONDS = 5.0
"""A write that takes longer is reported."""
GRACE_SECONDS = 60.0
"""How long a disk that refuses is tried after the end of the block."""


class BackgroundWriter:
    """A thread that writes, inside a `with` block; at its end everything has been written."""

    def __init__(self, notify: Notify | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        """Start the thread.

        Args:
            notify: Receives an event when the disk is slow, refuses, or works again.
            grace_seconds: How long the end of the block waits for a disk that refuses.
        """
        self._notify = notify or (lambda event, **details: None)
        self._grace = grace_seconds
        self._queue: queue.Queue[Write | None] = queue.Queue(MOST_WAITING)
        self._own: list[Write] = []
        """Writes that the thread itself submitted: it must not wait for room in the queue."""
        self._began: float | None = None
        """Time at which the write that is under way began."""
        self._reported_slow = False
        self._deadline: float | None = None
        self._error: BaseException | None = None
        self._lost = 0
        self._thread = threading.Thread(target=self._write_all, name="writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        """Wait until everything is written.

        Raises:
            RunDirectoryError: the disk refused some of it to the end.
        """
        self._deadline = time.monotonic() + self._grace
        self._queue.put(None)
        self._thread.join()
        if self._lost and raised[0] is None:
            raise RunDirectoryError(
                f"{self._lost} results could not be written: {self._error}.\n"
                "  Free some space, then resume the run: it repeats their trials."
            )
        if self._error is not None and raised[0] is None:
            raise self._error

    def submit(self, write: Write) -> None:
        """Queue a function that writes something; it is called again if the disk refuses.

        Blocks while too many wait, unless it is called by a write.
        """
        if threading.current_thread() is self._thread:
            self._own.append(write)
            return
        began = self._began
        if began is not None and not self._reported_slow:
            seconds = time.monotonic() - began
            if seconds > SLOW_SECONDS:
                self._reported_slow = True
                self._notify("disk-slow", waiting=self._queue.qsize() + 1, seconds=seconds)
        self._queue.put(write)

    def flush(self) -> None:
        """Return when everything submitted so far is written, or given up."""
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()

    def _write_all(self) -> None:
        while (write := self._queue.get()) is not None:
            self._own.append(write)
            while self._own:
                self._began = time.monotonic()
                try:
                    self._write(self._own.pop(0))
                except BaseException as error:  # noqa: BLE001  # raised at the end of the block
                    self._error = self._error or error
            self._began = None
            self._reported_slow = False

    def _write(self, write: Write) -> None:
        refused = False
        while True:
            try:
                write()
            except OSError as error:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._lost, self._error = self._lost + 1, error
                    return
                if not refused:
                    reason = error.strerror or str(error)
                    self._notify("disk-refuses", reason=reason, waiting=self._queue.qsize() + 1)
                refused = True
                self._reported_slow = True
                time.sleep(RETRY_SECONDS)
                continue
            if refused:
                self._notify("disk-back")
            return
