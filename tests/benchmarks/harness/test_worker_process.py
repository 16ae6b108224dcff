"""Processes of their own: workers that answer line by line, and single calls."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.harness.worker_process import (
    ROOT,
    WorkerError,
    answer,
    call_in_new_process,
    environment,
)


def test_a_command_that_fails_answers_with_its_traceback():
    def fail(**_):
        raise ValueError("no such point")

    assert "no such point" in answer({"go": fail}, {"command": "go", "x": 1})["error"]
    assert answer({"add": lambda a: {"b": a + 1}}, {"command": "add", "a": 1}) == {"b": 2}


def test_what_a_worker_prints_stays_out_of_its_answers():
    program = (
        "from benchmarks.harness.worker_process import serve\n"
        "def go(n):\n    print('chatter')\n    return {'twice': 2 * n}\n"
        "serve({'go': go})"
    )
    request = json.dumps({"command": "go", "n": 4}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=request,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment(1),
    )
    assert done.stdout == '{"twice": 8}\n'
    assert "chatter" in done.stderr


def describe_process(divisor):
    sys.stdout.write("chatter\n")
    return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "half": 1 / divisor}


def test_a_function_is_called_in_a_process_of_its_own_with_so_many_threads():
    described = call_in_new_process(describe_process, 2, threads=3)
    assert described["pid"] != os.getpid()
    assert (described["threads"], described["half"]) == ("3", 0.5)


def test_a_function_that_fails_in_its_process_is_an_error_that_names_it():
    with pytest.raises(WorkerError, match="describe_process failed"):
        call_in_new_process(describe_process, 0)
