"""Writes files in the background, so that a slow or full disk keeps nobody from computing.

Everything is written in the order it was handed in, by one thread. While the disk refuses, results
wait in memory and are tried again; they are lost only if it still refuses after the end.
"""

import queue
import threading
import time
from collections.abc import Callable

from ray_abliterate.errors import RunDirectoryError

Work = Callable[[], None]
Tell = Callable[..., None]

MOST_WAITING = 10_000
"""Writes that may wait; who hands in more has to."""
RETRY_SECONDS = 2.0
SLOW_SECONDS = 5.0
"""A write that takes longer is worth a word."""
GRACE_SECONDS = 60.0
"""After the end, the disk has so long to take what waits."""


class BackgroundWriter:
    """A thread that writes, inside a `with` block; at its end everything has been written."""

    def __init__(self, tell: Tell | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        """Start.

        Args:
            tell: Told of a disk that is slow, refuses, or works again: name and details.
            grace_seconds: How long the end waits for a disk that refuses.
        """
        self._tell = tell or (lambda event, **details: None)
        self._grace = grace_seconds
        self._queue: queue.Queue[Work | None] = queue.Queue(MOST_WAITING)
        self._own: list[Work] = []
        """What the writing of something gave to write: waiting for room would be for itself."""
        self._began: float | None = None
        self._told_slow = False
        self._end: float | None = None
        self._error: BaseException | None = None
        self._lost = 0
        self._thread = threading.Thread(target=self._write_all, name="writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        """Wait until all is written.

        Raises:
            RunDirectoryError: the disk took not everything.
        """
        self._end = time.monotonic() + self._grace
        self._queue.put(None)
        self._thread.join()
        if self._lost and raised[0] is None:
            raise RunDirectoryError(
                f"{self._lost} results could not be written: {self._error}.\n"
                "  Free some space; resume does their trials again."
            )
        if self._error is not None and raised[0] is None:
            raise self._error

    def submit(self, work: Work) -> None:
        """Hand in something to write; it may be called again if the disk refuses it."""
        if threading.current_thread() is self._thread:
            self._own.append(work)
            return
        began = self._began
        if began is not None and not self._told_slow:
            seconds = time.monotonic() - began
            if seconds > SLOW_SECONDS:
                self._told_slow = True
                self._tell("disk-slow", waiting=self._queue.qsize() + 1, seconds=seconds)
        self._queue.put(work)

    def flush(self) -> None:
        """Return when all that was handed in is written, or given up."""
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()

    def _write_all(self) -> None:
        while (work := self._queue.get()) is not None:
            self._own.append(work)
            while self._own:
                self._began = time.monotonic()
                try:
                    self._write(self._own.pop(0))
                except BaseException as error:  # noqa: BLE001  # raised at the end of the block
                    self._error = self._error or error
            self._began = None
            self._told_slow = False

    def _write(self, work: Work) -> None:
        refused = False
        while True:
            try:
                work()
            except OSError as error:
                if self._end is not None and time.monotonic() > self._end:
                    self._lost, self._error = self._lost + 1, error
                    return
                if not refused:
                    reason = error.strerror or str(error)
                    self._tell("disk-refuses", reason=reason, waiting=self._queue.qsize() + 1)
                refused = True
                self._told_slow = True
                time.sleep(RETRY_SECONDS)
                continue
            if refused:
                self._tell("disk-back")
            return
