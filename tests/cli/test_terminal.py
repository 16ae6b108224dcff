"""The terminal shows our lines only; what libraries say is in a log, and errors are always told."""

import ctypes
import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_abliterate.cli.terminal import Terminal, console, log_to, say
from tests.support.finished_runs import Finished

ROOT = Path(__file__).parents[2]
LIBC = ctypes.CDLL(None)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Terminal]:
    """A terminal whose libraries are silenced, with its log in the test's folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    terminal = Terminal(["run", "my recipe.toml"])
    yield terminal
    terminal.close()


def make_noise() -> None:
    """Speak in each way that libraries do."""
    sys.stdout.write("NOISE printed\n")
    sys.stderr.write("NOISE on stderr\n")
    os.write(1, b"NOISE on descriptor 1\n")
    os.write(2, b"NOISE on descriptor 2\n")
    LIBC.puts(b"NOISE of C")
    LIBC.fflush(None)
    logging.getLogger("some.library").warning("NOISE logged")


NOISES = 6


def test_whatever_libraries_say_goes_into_the_log_and_our_lines_to_the_user(
    quiet: Terminal, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet.quiet()
    make_noise()
    say("ours")
    say("our error", err=True)
    console().print("our table")
    logging.getLogger("ray_abliterate.model").warning("our warning")
    assert quiet.log is not None
    text = quiet.log.read_text()
    quiet.restore()
    shown = capfd.readouterr()
    assert shown.out == "ours\nour table\n"
    assert shown.err == "our error\nwarning: our warning\n"
    assert text.count("NOISE") == NOISES
    sys.stdout.write("printed after\n")
    assert capfd.readouterr().out == "printed after\n"


def test_the_log_moves_into_the_run_directory_and_grows_with_each_command(
    quiet: Terminal, tmp_path: Path
) -> None:
    log = tmp_path / "run.txt"
    log.write_text("--- earlier\n")
    quiet.quiet()
    os.write(1, b"before\n")
    log_to(log)
    os.write(2, b"after\n")
    quiet.close()
    assert re.fullmatch(
        r"--- earlier\n--- [-\d]+ [\d:]+ ray-abliterate run 'my recipe.toml'\nbefore\nafter\n",
        log.read_text(),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]


@pytest.mark.parametrize("earlier", ["", "--- earlier\n"])
def test_a_command_in_which_libraries_are_silent_leaves_no_trace(
    quiet: Terminal, tmp_path: Path, earlier: str
) -> None:
    log = tmp_path / "run.txt"
    if earlier:
        log.write_text(earlier)
    quiet.quiet()
    log_to(log)
    quiet.close()
    assert (log.read_text() if log.exists() else "") == earlier
    assert len(list(tmp_path.iterdir())) == bool(earlier)


def test_a_run_directory_that_cannot_be_written_keeps_the_log_elsewhere(
    quiet: Terminal, tmp_path: Path
) -> None:
    quiet.quiet()
    log_to(tmp_path / "missing" / "log.txt")
    assert quiet.log is not None and quiet.log.parent == tmp_path
    quiet.close()
    assert not list(tmp_path.iterdir())


def test_a_crash_is_one_line_that_names_the_log_with_the_traceback(
    quiet: Terminal, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet.quiet()
    try:
        raise KeyError("weights\nof layer 3")
    except KeyError as error:
        quiet.report_crash(error)
    quiet.close()
    line = capfd.readouterr().err
    assert re.fullmatch(
        r"crashed: KeyError: 'weights\\nof layer 3'. The traceback is in .*\n", line
    )
    assert quiet.log is not None and "Traceback" in quiet.log.read_text()


def test_an_error_in_another_thread_is_told_too(
    quiet: Terminal, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet.quiet()
    thread = threading.Thread(target=lambda: {}["no"])  # type: ignore[index]
    thread.start()
    thread.join()
    quiet.close()
    assert "crashed: KeyError: 'no'" in capfd.readouterr().err
    assert quiet.log is not None and "Traceback" in quiet.log.read_text()


def test_verbose_leaves_libraries_on_the_terminal(
    quiet: Terminal, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet.show_all()
    make_noise()
    logging.getLogger("ray_abliterate.model").warning("our warning")
    quiet.close()
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("NOISE") >= NOISES
    assert shown.err.count("our warning") == 1


def test_streams_that_a_program_replaced_get_our_lines(quiet: Terminal) -> None:
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        quiet.quiet()
        say("ours")
        sys.stdout.write("NOISE")
        quiet.restore()
        assert (sys.stdout, sys.stderr) == (out, err)
    finally:
        sys.stdout, sys.stderr = before
    assert (out.getvalue(), err.getvalue()) == ("ours\n", "")


# Commands, each in a process of its own. A scorer of the recipe's own makes the noise, here and in
# the replicas, beside what torch, transformers and Ray say of themselves.

NOISY = """
import os, sys, warnings, logging
from ray_abliterate.search.score import Score

def make_noise():
    print("NOISE printed")
    os.write(2, b"NOISE on descriptor 2\\n")
    warnings.warn("NOISE warned", FutureWarning)
    logging.getLogger("someone").warning("NOISE logged")

make_noise()

class Noisy:
    def __init__(self, name, goal):
        make_noise()
        self.name, self.goal = name, goal

    def prepare(self, model):
        make_noise()

    def score(self, model):
        make_noise()
        return Score(self.name, 0.5, 0.4, 0.6, self.goal)
"""
LIBRARY_LINE = re.compile(
    r"NOISE|Traceback|site-packages|[Dd]eprecat|WARNING|^\w*Warning|^[WEI]\d{4} |\(pid=|torchao"
)


def run_verb(
    *arguments: str, folder: Path, code: int = 0, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, and assert that every line of it is ours."""
    done = subprocess.run(
        [sys.executable, "-m", "ray_abliterate", *arguments], cwd=folder, text=True, input=stdin,
        capture_output=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    for line in (done.stdout + done.stderr).splitlines():
        assert not LIBRARY_LINE.search(line), line
    return done


def test_a_wrong_use_is_explained_on_the_terminal(tmp_path: Path) -> None:
    done = run_verb("run", "--frobnicate", folder=tmp_path, code=2)
    assert "No such option" in done.stderr
    assert "--verbose" in run_verb("--help", folder=tmp_path).stdout


@pytest.mark.parametrize("verb", ["show", "report", "residuals", "chat", "resume"])
def test_a_run_that_is_missing_is_reported_before_anything_heavy_is_imported(
    verb: str, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from ray_abliterate.cli.app import run_command\n"
        "try:\n    run_command(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'plotly', 'optuna', 'numpy'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verb, "nowhere"], cwd=tmp_path, text=True,
        capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "RunNotFound: nowhere holds no run" in done.stderr
    assert done.stdout == "[]\n"


def test_verbs_that_read_a_run_print_our_lines_only(planted_copy: Finished, tmp_path: Path) -> None:
    path = str(planted_copy.directory.path)
    for arguments in (
        ("init", "recipe.toml"),
        ("show", path),
        ("show", path, "--trial", "0"),
        ("report", path),
        ("residuals", path, "--to", "pages"),
        ("directions", path, "--to", "pages", "--pairs", "2", "--method", "mean-difference"),
    ):
        run_verb(*arguments, folder=tmp_path)


def test_verbs_that_load_a_model_print_our_lines_only(
    planted_copy: Finished, planted_folder: Path, tmp_path: Path
) -> None:
    path = str(planted_copy.directory.path)
    number = next(t.number for t in planted_copy.directory.trials() if t.scorecard is not None)
    chosen = (path, "--trial", str(number))
    assert len(run_verb("chat", *chosen, folder=tmp_path, stdin="Hello\n").stdout.splitlines()) == 1
    adapter = ("--to", "adapter", "--as", "adapter", "--no-verify")
    run_verb("export", *chosen, *adapter, folder=tmp_path)
    run_verb("export", *chosen, "--to", "merged", folder=tmp_path)
    base = ("--base", str(planted_folder))
    run_verb("reproduce", "merged", "--to", "again", *base, folder=tmp_path)


@pytest.mark.ray
def test_a_run_prints_our_lines_only_and_logs_the_noise_of_its_driver(
    planted_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "recipe.toml").write_text(
        f"""
[model]
name = "{planted_folder}"

[prompts]
behaviour = {{ builtin = "cooking-train", split = "[:8]" }}
neutral = {{ builtin = "other-train", split = "[:8]" }}

[search]
trials = 2
startup_trials = 2

[[scorers]]
kind = "kl-divergence"
prompts = {{ builtin = "other-heldout", split = "[:8]" }}

[[scorers]]
kind = "noisy:Noisy"
name = "noisy"
goal = "minimize"
"""
    )
    run_verb("doctor", "recipe.toml", folder=tmp_path)
    done = run_verb("run", "recipe.toml", "--to", "run", folder=tmp_path)
    assert "[2/2] trial 1: kl-divergence" in done.stdout
    assert "NOISE printed" in (tmp_path / "run" / "log.txt").read_text()
    run_verb("evaluate", "run", "--suite", "kl", folder=tmp_path, code=2)
    loud = subprocess.run(
        [sys.executable, "-m", "ray_abliterate", "doctor", "recipe.toml", "-v"], cwd=tmp_path,
        text=True, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert loud.returncode == 0 and "NOISE printed" in loud.stdout
