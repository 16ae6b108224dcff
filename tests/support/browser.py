"""A page in headless Chromium: what it draws, what it complains of, what it asks for.

Chromium's own protocol (Chrome DevTools Protocol) over a pipe; nothing listens on a port.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0
"""How long an answer may take."""
START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); " + (
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads its commands from descriptor 3, and writes to 4."""


def chromium() -> str | None:
    """The browser's program, if it is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser refused a command, or said nothing for too long."""


class Browser:
    """One page of one browser; see `opened`."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        """Talk over two pipes."""
        self._commands, self._answers = commands, answers
        self._last, self._session = 0, ""
        self._buffer = b""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self.complaints: list[str] = []
        """Errors and warnings of scripts, of the console and of the page's policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer.

        Raises:
            BrowserError: the browser refuses it, or does not answer.
        """
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        number = self._last
        answer = self._until(lambda found: found.get("id") == number, method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer.get("result", {})
        return result

    def look(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """Be a screen of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Load a file, to the end of its scripts."""
        self.call("Page.navigate", url=page.absolute().as_uri())
        self._until(lambda found: found.get("method") == "Page.loadEventFired", "loading")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of what a promise brings, if it is one.

        Raises:
            BrowserError: it throws.
        """
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise BrowserError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def picture(self, whole: bool = False) -> bytes:
        """The screen, or the whole page, as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(taken["data"])

    def _until(self, wanted: Any, what: str) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            text, separator, rest = self._buffer.partition(b"\0")
            if not separator:
                if not select.select([self._answers], [], [], end - time.monotonic())[0]:
                    break
                part = os.read(self._answers.fileno(), 1 << 16)
                if not part:
                    raise BrowserError(f"{what}: the browser has ended")
                self._buffer += part
                continue
            self._buffer = rest
            message: dict[str, Any] = json.loads(text)
            self._note(message)
            if wanted(message):
                return message
        raise BrowserError(f"{what}: no answer within {SECONDS:.0f} s")

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(
                details.get("exception", details).get("description", str(details))
            )
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str([value.get("value") for value in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    """A browser with an empty page; it ends with the block."""
    (reads, commands), (answers, writes) = _pipe(), _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(reads), str(writes), program, *flags],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reads)
        os.close(writes)
        try:
            with os.fdopen(commands, "wb") as sent, os.fdopen(answers, "rb", 0) as received:
                yield Browser(sent, received)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pipe() -> tuple[int, int]:
    """Both ends above the numbers that the browser expects its own at."""
    ends = os.pipe()
    found = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return found[0], found[1]
