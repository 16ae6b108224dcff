"""Faults of the driver, its files and its clock, on runs of the command line.

Each scenario is a function of an empty folder and a cluster, which it does not use; its docstring
says what is done.
"""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.fault_recovery.cli_run import CliRun
from benchmarks.fault_recovery.outcome import PATIENCE_SECONDS, Outcome, check, wait_until


def driver_killed(folder: Path, cluster: Any, times: int = 10) -> Outcome:
    """Kill the driver at ten random moments, half of them before any trial, and resume it."""
    run, chance = CliRun(folder, trials=20 + 15 * times), random.Random(7)
    finished: dict[int, str] = {}
    lost = 0
    for attempt in range(times):
        process, before = run.start(), run.count()
        if attempt % 2:
            wait_until(lambda before=before: run.count() > before)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 1.0 if attempt % 2 else 10.0))
        running = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        check(running, output)
        lost += run.lost_trials(finished)
        finished = run.finished_trials()
    seconds = run.run_to_the_end()
    lost += run.lost_trials(finished)
    return Outcome(len(finished), lost, run.interrupted_trials(), 0, seconds, ())


def terminated(folder: Path, cluster: Any) -> Outcome:
    """Send SIGTERM, as before a machine is taken away, and wait for a clean end."""
    run = CliRun(folder)
    process = run.start()
    wait_until(lambda: run.count() >= 5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    run.output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    check(process.returncode == 130, run.output)
    last = tuple(line for line in run.output.splitlines() if "ray-abliterate resume" in line)
    check(bool(last), run.output)
    finished = run.finished_trials()
    run.run_to_the_end()
    lost = run.lost_trials(finished)
    seen = (f"ended {seconds:.1f} s after the signal", *last)
    return Outcome(len(finished), lost, run.interrupted_trials(), 0, round(seconds, 2), seen)


def disk_full(folder: Path, cluster: Any) -> Outcome:
    """Let the run directory take no byte more for a while (by a limit on the size of files)."""
    run = CliRun(folder)
    process = run.start()
    wait_until(lambda: run.count() >= 5)
    size = (run.directory / "study.journal").stat().st_size
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
    finished = run.finished_trials()
    time.sleep(12.0)  # Tune writes its state every ten seconds, if it is allowed to
    check(process.poll() is None, "the driver ended")
    stuck = run.count()
    began = time.monotonic()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    wait_until(lambda: run.count() > stuck or process.poll() is not None)
    seconds = time.monotonic() - began
    run.output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    check(process.returncode == 0, run.output)
    run.check_all_trials()
    seen = tuple(line for line in run.output.splitlines() if "can't be written" in line)
    check(bool(seen), run.output)
    return Outcome(len(finished), run.lost_trials(finished), 0, 0, round(seconds, 2), seen[:1])


def two_drivers(folder: Path, cluster: Any) -> Outcome:
    """Start a second driver on a run directory that is in use."""
    run = CliRun(folder, trials=400)
    process = run.start()
    wait_until(lambda: run.count() >= 3)
    finished, began = run.finished_trials(), time.monotonic()
    second = run.start()
    refusal, _ = second.communicate(timeout=60)
    seconds = time.monotonic() - began
    check(second.returncode == 2 and "in use" in refusal, refusal)
    check(process.poll() is None, "the first driver ended before it was disturbed")
    process.send_signal(signal.SIGTERM)
    run.output, _ = process.communicate(timeout=60)
    check(process.returncode == 130, run.output)
    seen = tuple(refusal.strip().splitlines()[-1:])
    return Outcome(len(finished), run.lost_trials(finished), 0, 0, round(seconds, 2), seen)


def torn_journal(folder: Path, cluster: Any) -> Outcome:
    """Cut the power while a line of the journal is written."""
    run = CliRun(folder)
    process = run.start()
    wait_until(lambda: run.count() >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished, journal = run.finished_trials(), run.directory / "study.journal"
    *whole, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole) + last + last[: len(last) // 2])
    seconds = run.run_to_the_end()
    lost = run.lost_trials(finished)
    return Outcome(len(finished), lost, run.interrupted_trials(), 0, seconds, ())


def damaged_shard(folder: Path, cluster: Any) -> Outcome:
    """Cut a residual shard in the cache in half between two runs."""
    cache = {"RAY_ABLITERATE_CACHE": str(folder / "cache")}
    first = CliRun(folder, cache, trials=8)
    first.run_to_the_end()
    shard = next((folder / "cache" / "residuals").rglob("*.arrow"))
    data = shard.read_bytes()
    shard.unlink()  # the run directory has the same file under another name
    shard.write_bytes(data[: len(data) // 2])
    (folder / "second").mkdir()
    second = CliRun(folder / "second", cache, trials=8)
    seconds = second.run_to_the_end()
    check(first.directions() == second.directions(), "other directions")
    output = " ".join(second.output.split())  # the terminal's lines are wrapped
    check("is damaged" in output, second.output)
    seen = "warning: … is damaged and is made again: …"
    lost = first.lost_trials(first.finished_trials())
    return Outcome(8, lost, 0, 0, seconds, (seen,))


# Ray's core is spared: its waits are measured by the kernel's clock, which can't be moved here.
CLOCK_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (id != CLOCK_REALTIME) return result;
    struct stat s;
    long jump = 0;
    if (!stat(getenv("CLOCK_AHEAD"), &s)) jump = 90000;
    if (!stat(getenv("CLOCK_BEHIND"), &s)) jump = -7200;
    Dl_info caller;
    if (jump && dladdr(__builtin_return_address(0), &caller) && !strstr(caller.dli_fname, "/ray/")
        && !strstr(caller.dli_fname, "libstdc++"))
        t->tv_sec += jump;
    return result;
}
"""


def clock_jumps(folder: Path, cluster: Any) -> Outcome:
    """Move the clock of all Python processes a day ahead, then two hours behind."""
    (folder / "clock.c").write_text(CLOCK_SHIM)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", "clock.so", "clock.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    ahead, behind = folder / "ahead", folder / "behind"
    shim = {"LD_PRELOAD": str(folder / "clock.so")}
    jumps = {"CLOCK_AHEAD": str(ahead), "CLOCK_BEHIND": str(behind)}
    run = CliRun(folder, shim | jumps, trials=50)
    process = run.start()
    wait_until(lambda: run.count() >= 3)
    finished, began, count = run.finished_trials(), time.monotonic(), run.count()
    ahead.touch()
    wait_until(lambda: run.count() > count + 3 or process.poll() is not None)
    seconds = time.monotonic() - began
    ahead.unlink()
    behind.touch()
    running = len(finished) < run.trials and process.poll() is None
    check(running, "it was over before the clock jumped")
    run.output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    check(process.returncode == 0, run.output)
    run.check_all_trials()
    return Outcome(len(finished), run.lost_trials(finished), 0, 0, round(seconds, 2), ())
