"""Processes of their own for what a benchmark measures: workers that answer, and single calls.

The standard library only, because one side may run in another program's environment. A worker
reads one command per line as JSON and answers with one line; between commands it sleeps on its
standard input. What its libraries print goes to its standard error, which the benchmark writes to a
file.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOG_LINES = 20
"""The last lines of a worker's log that an error shows."""


class WorkerError(RuntimeError):
    """Says that a worker died, or that a command raised an exception in it."""


class Worker:
    """A process that answers commands until the `with` block ends."""

    def __init__(self, python: Path, module: str, folder: Path, threads: int) -> None:
        """Start the process.

        Args:
            python: The interpreter.
            module: A module that calls `serve` when it is run.
            folder: The working directory, where the log is written, too.
            threads: CPU threads of its libraries; the worker also sets torch's.
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
        """Return the worker's answer to a command.

        Raises:
            WorkerError: The command failed there, or the worker died; the message has the
                traceback, or the end of the worker's log.
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
        """Close the worker's input so that it ends, and kill it if it is not gone in 10 seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a measured process: threads, no Hub, this repository importable."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HERETIC_")}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer commands until standard input ends.

    Both standard streams are moved aside first, so that nothing a library prints or asks for gets
    between the lines.

    Args:
        commands: Functions by the name of their command; each returns values that JSON has.
    """
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    os.dup2(2, 1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    sys.argv = sys.argv[:1]
    for line in requests:
        answers.write(json.dumps(answer(commands, json.loads(line))) + "\n")
        answers.flush()


def answer(
    commands: Mapping[str, Callable[..., dict[str, Any]]], request: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what one command returns; an exception becomes `{"error": traceback}`."""
    arguments = {k: v for k, v in request.items() if k != "command"}
    try:
        return commands[request["command"]](**arguments)
    except Exception:  # noqa: BLE001  # `Worker.call` raises it on the other side
        return {"error": traceback.format_exc()}


def call_in_new_process(
    function: Callable[..., dict[str, Any]], *arguments: Any, threads: int | None = None
) -> dict[str, Any]:
    """Return what a function returns in a new Python process, so that its memory is its own.

    Args:
        function: A function at the top level of its module, whose result is values that JSON has.
            What it prints on standard error is shown.
        *arguments: Its arguments: values that JSON has.
        threads: OpenMP threads of the process; as many as here if None.

    Raises:
        WorkerError: The function failed; its traceback is on standard error.
    """
    module = _importable_module(function)
    program = (
        "import importlib, json, sys; module, name, arguments = sys.argv[1:]; "
        "function = getattr(importlib.import_module(module), name); "
        "print(json.dumps(function(*json.loads(arguments))))"
    )
    words = [sys.executable, "-c", program, module, function.__name__, json.dumps(arguments)]
    variables = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": _python_path(), **variables},
    )
    if done.returncode:
        raise WorkerError(f"{module}.{function.__name__} failed in a process of its own")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _importable_module(function: Callable[..., Any]) -> str:
    """Return the name by which another process imports a function's module."""
    if function.__module__ != "__main__":
        return function.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run the benchmark by its command: python -m benchmarks.NAME"
    return spec.name


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
