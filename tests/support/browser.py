"""Drive a page in headless Chromium: what it draws, complains about and requests.

Speaks the Chrome DevTools Protocol over a pipe; nothing listens on a port.
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

NAMES = ("find_chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0
"""Longest wait for an answer."""
START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); " + (
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
"""Starts Chromium, which reads commands from file descriptor 3 and writes answers to 4."""


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser refused a command, or did not answer in time."""


class Browser:
    """Represents one page of one browser; see `open_browser`."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        """Attach to a new page over two pipes."""
        self._commands, self._answers = commands, answers
        self._last, self._session = 0, ""
        self._buffer = b""
        self.requests: list[str] = []
        """Addresses that the page requested."""
        self.complaints: list[str] = []
        """Errors and warnings of scripts, of the console and of the page's policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the protocol, and return its answer.

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
        answer = self._until(lambda message: message.get("id") == number, method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer.get("result", {})
        return result

    def set_screen(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """Emulate a screen; width and height are in CSS pixels."""
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
        """Load a file, and wait until its scripts have run."""
        self.call("Page.navigate", url=page.absolute().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired", "loading")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page and return its value, or what its promise resolves to.

        Raises:
            BrowserError: the expression throws.
        """
        evaluated = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in evaluated:
            raise BrowserError(f"{script}: {evaluated['exceptionDetails']}")
        return evaluated["result"].get("value")

    def picture(self, whole: bool = False) -> bytes:
        """Return the screen, or the whole page, as PNG bytes."""
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
def open_browser(program: str) -> Iterator[Browser]:
    """Start a browser with an empty page, and end it with the block."""
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
    """Return both ends of a pipe, with numbers above those that the browser uses itself."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
