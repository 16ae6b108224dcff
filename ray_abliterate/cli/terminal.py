"""Keep the terminal for our own lines; what libraries say goes into a log file.

    terminal = Terminal(["run", "recipe.toml"])
    terminal.quiet()                      # file descriptors 1 and 2 are redirected to a log
    say("a line that the user sees")
    log_to(directory.log)                 # the log moves into the run directory
    terminal.restore()
    terminal.close()                      # deletes a log that nobody needs

Libraries print while they are imported, warn through `warnings` and `logging`, and write to file
descriptors from C++. All of that is redirected in one place, below Python's streams. Unless `quiet`
was called, everything goes to `sys.stdout` and `sys.stderr`.
"""

import atexit
import faulthandler
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

PIPE_WIDTH = 110
"""Characters of a line where the output is no terminal."""
OURS = "ray_abliterate"
"""Warnings of loggers below this name are shown to the user."""

_active: "Terminal | None" = None
_console: Console | None = None


def user_stdout() -> TextIO:
    """Return the user's standard output, whether libraries are silenced or not."""
    return _active.user_streams[0] if _active and _active.user_streams else sys.stdout


def user_stderr() -> TextIO:
    """Return the user's standard error, whether libraries are silenced or not."""
    return _active.user_streams[1] if _active and _active.user_streams else sys.stderr


def console() -> Console:
    """Return the console on standard output; the same one while the output stays the same.

    Where the output is no terminal, its lines are `PIPE_WIDTH` wide.
    """
    global _console
    stream = user_stdout()
    if _console is None or _console.file is not stream:
        width = None if stream.isatty() else PIPE_WIDTH
        _console = Console(file=stream, width=width, highlight=False)
    return _console


def say(text: object, err: bool = False) -> None:
    """Write one line to the user's standard output, or to standard error."""
    stream = user_stderr() if err else user_stdout()
    stream.write(f"{text}\n")
    stream.flush()


def is_quiet() -> bool:
    """Return whether libraries are silenced now."""
    return _active is not None


def log_to(path: Path) -> None:
    """Move the log of the current command to `path`, a file of its run directory.

    A file that cannot be written to is left alone: the log then stays where it is.
    """
    if _active is not None:
        _active.log_to(path)


def release_terminal() -> None:
    """Stop silencing libraries: another program, or a library's own display, takes over."""
    if _active is not None:
        _active.restore()


class WarningDisplay(logging.Handler):
    """Shows the package's own warnings to the user, above a live display if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `warning: …`, or the level that the record has."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if user_stdout().isatty():
            console().print(text, markup=False, soft_wrap=True)
        else:
            say(text, err=True)


class Terminal:
    """Represents the terminal of one command, and the log of what libraries say meanwhile."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Leave everything as it is; `arguments` are the command's, for the log."""
        self._arguments = tuple(arguments)
        self._log: Path | None = None
        self._start = 0  # size of the log before this command, in bytes
        self._header = 0  # bytes of the line that begins this command's part
        self._is_temporary = True
        self._is_needed = False
        self._saved: tuple[int, int] | None = None
        self._streams: tuple[TextIO, TextIO] | None = None
        self.user_streams: tuple[TextIO, TextIO] | None = None
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []
        self._excepthook = threading.excepthook

    @property
    def log(self) -> Path | None:
        """The file that holds what libraries said; None if nothing was silenced."""
        return self._log

    def show_all(self) -> None:
        """Show what libraries print, and their loggers' warnings."""
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        handler.addFilter(lambda record: record.name.split(".")[0] != OURS)
        self._handle(logging.getLogger(), handler)
        self._handle(logging.getLogger(OURS), WarningDisplay())

    def quiet(self) -> None:
        """Redirect file descriptors 1 and 2, and Python's streams, to a temporary log."""
        global _active
        try:
            descriptor, name = tempfile.mkstemp(prefix="ray-abliterate-", suffix=".log")
        except OSError:  # no temporary folder: a noisy terminal is better than no command
            return self.show_all()
        self._log = Path(name)
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = os.dup(1), os.dup(2)
        self._streams = sys.stdout, sys.stderr
        self.user_streams = (
            _duplicate(sys.stdout, 1, self._saved[0]),
            _duplicate(sys.stderr, 2, self._saved[1]),
        )
        _active = self
        self._redirect(descriptor)
        sys.stdout, sys.stderr = _line_stream(1), _line_stream(2)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        self._handle(logging.getLogger(), handler)
        self._handle(logging.getLogger(OURS), WarningDisplay())
        threading.excepthook = self._report_thread
        if not faulthandler.is_enabled():
            with suppress(OSError, ValueError):  # a stream without a file descriptor
                faulthandler.enable(user_stderr())

    def log_to(self, path: Path) -> None:
        """Append the log so far to a file, below a line with the command, and continue there.

        If the file cannot be written, the log stays where it is.
        """
        if self._log is None or not self._is_temporary:
            return
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:
            return
        self._flush()
        self._start = os.fstat(descriptor).st_size
        command = shlex.join(["ray-abliterate", *self._arguments])
        header = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {command}\n".encode()
        self._header = len(header)
        os.write(descriptor, header + self._log.read_bytes())
        self._log.unlink(missing_ok=True)
        self._log, self._is_temporary = path, False
        if self._saved is not None:
            self._redirect(descriptor)
        else:
            os.close(descriptor)

    def report_crash(self, error: BaseException) -> None:
        """Write the traceback into the log, and one line about it to the user.

        Without a log, the traceback itself goes to the user.
        """
        text = "".join(traceback.format_exception(error))
        if self._log is None:
            user_stderr().write(text)
            user_stderr().flush()
            return
        self._is_needed = True
        self._flush()
        with self._log.open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"crashed: {what}. The traceback is in {self._log}", err=True)

    def restore(self) -> None:
        """Restore file descriptors and streams; the log stays until `close`."""
        global _active
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
        self._handlers.clear()
        if self._saved is None or self._streams is None:
            return
        self._flush()
        for stream in self.user_streams or ():
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = self._streams
        for descriptor, saved in enumerate(self._saved, start=1):
            os.dup2(saved, descriptor)
        # The duplicates stay open, since a console may still write to them.
        self._saved = self._streams = self.user_streams = _active = None
        threading.excepthook = self._excepthook

    def close(self) -> None:
        """End the command: delete a temporary log that is not needed, and a log without lines."""
        self.restore()
        if self._log is None:
            return
        if self._is_temporary:
            if not self._is_needed:
                self._log.unlink(missing_ok=True)
        elif self._log.exists() and self._log.stat().st_size == self._start + self._header:
            if self._start:
                os.truncate(self._log, self._start)
            else:
                self._log.unlink()

    def silence_exit(self) -> None:
        """Redirect what libraries print while the process exits to the run's log, or to nowhere."""
        if self._log is not None:
            atexit.register(_silence, Path(os.devnull) if self._is_temporary else self._log)

    def _handle(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._handlers.append((logger, handler))

    def _redirect(self, descriptor: int) -> None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    def _report_thread(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and failure.exc_type is not SystemExit:
            self.report_crash(failure.exc_value)


def _duplicate(stream: TextIO, descriptor: int, saved: int) -> TextIO:
    """Return a stream to where `stream` went, or `stream` itself if it uses another descriptor."""
    try:
        if stream.fileno() != descriptor:
            return stream
    except (OSError, ValueError):
        return stream
    return open(saved, "w", buffering=1, encoding=stream.encoding, errors=stream.errors)


def _line_stream(descriptor: int) -> TextIO:
    return open(
        descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )


def _silence(path: Path) -> None:
    """Redirect file descriptors 1 and 2 to a file, or to nowhere if it does not exist."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        descriptor = os.open(path if path.exists() else os.devnull, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
