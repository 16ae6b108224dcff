"""How much memory this process holds. The standard library only (Linux, partly macOS)."""

import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path


def peak_bytes() -> int:
    """Return the largest resident set of this process so far, as the kernel counted it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def anonymous_bytes() -> int:
    """Return the resident memory that maps no file (Linux)."""
    return _status_bytes("RssAnon:")


def resident_bytes() -> int:
    """Return the resident set, pages of mapped files included (Linux)."""
    return _status_bytes("VmRSS:")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


class PeakMemory:
    """Samples the memory that this process holds while a `with` block runs.

    Attributes:
        before: Bytes at the start.
        highest: The most bytes at any sample.
    """

    def __init__(self, read: Callable[[], int], interval_seconds: float) -> None:
        """
        Args:
            read: Returns the bytes that the process holds.
            interval_seconds: Time between two samples.
        """
        self._read, self._interval = read, interval_seconds
        self.before = self.highest = 0

    def __enter__(self) -> "PeakMemory":
        self.before = self.highest = self._read()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.highest = max(self.highest, self._read())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, self._read())

    @property
    def added(self) -> int:
        """Bytes held at the peak beyond those at the start."""
        return self.highest - self.before
