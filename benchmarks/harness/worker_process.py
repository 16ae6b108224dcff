"""Line-delimited JSON between a benchmark and the processes it measures.

The standard library only, because one side may run in another program's environment. A worker
reads one command a line and answers with one line; between commands it sleeps on its standard
input. What its libraries print goes to its standard error, which the benchmark keeps in a file.
"""

import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOG_LINES = 20
"""Last lines of a worker's log that an error shows."""


class WorkerError(RuntimeError):
    """A worker died, or a command raised in it."""


class Worker:
    """A process that answers commands; stopped at the end of the `with` block."""

    def __init__(self, python: Path, module: str, folder: Path, threads: int) -> None:
        """Start it.

        Args:
            python: The interpreter.
            module: A module with a main function that calls `serve`.
            folder: Its working directory, and the place of its log.
            threads: CPU threads of its libraries; the worker also tells torch.
        """
        self._log = folder / f"{module.rpartition('.')[2]}-{os.getpid()}-{id(self)}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment(threads),
                text=True,
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            WorkerError: with the worker's traceback, or the end of its log if it died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self._log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
            raise WorkerError("\n".join([f"the worker died during {command!r}:", *tail]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{command!r} failed in the worker:\n{answer['error']}")
        return answer

    def stop(self) -> None:
        """Let it end; a worker that does not end in 10 seconds is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def environment(threads: int) -> dict[str, str]:
    """Variables of a measured process: equal threads, no hub, this repository importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HERETIC_")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer commands until standard input ends.

    Both standard streams are moved aside first, so that nothing a library prints or asks can get
    between the lines.
    """
    answers = os.fdopen(os.dup(1), "w")
    orders = os.fdopen(os.dup(0))
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.argv = sys.argv[:1]
    for line in orders:
        answers.write(json.dumps(answer(commands, json.loads(line))) + "\n")
        answers.flush()


def answer(
    commands: Mapping[str, Callable[..., dict[str, Any]]], order: Mapping[str, Any]
) -> dict[str, Any]:
    """What one command returns; an exception becomes `{"error": traceback}`."""
    arguments = {k: v for k, v in order.items() if k != "command"}
    try:
        return commands[order["command"]](**arguments)
    except Exception:  # noqa: BLE001  # the other side raises it
        return {"error": traceback.format_exc()}


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
