"""What each fault costs: really done, to processes that were started for it, counted and timed.

    python -m benchmarks.fault_recovery [NAME ...]

Stand-ins for replicas score at once and take a fixed time; everything else is the real thing: the
pool, the fleet, Tune, the study, and for faults of the driver the command line with the planted
model. A scenario raises if a finished trial is lost, or the study doesn't end at its number.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import save
from ray_abliterate.cluster.replica_actor import Callee

GOALS = [("rate", "minimize"), ("kl", "minimize")]
PATIENCE_SECONDS = 400.0
HOG_BYTES = 4_000_000_000
"""What a replica takes that is to be killed for it."""


@dataclass(frozen=True)
class Outcome:
    """What a fault cost.

    Attributes:
        finished_before: Trials that had finished when it happened.
        lost: Of these, not there at the end: always 0, or the scenario raises.
        again: Trials that were evaluated more than once.
        failed: Trials that ended with an error.
        recovery_seconds: From the fault to the next finished trial.
        seen: What the user reads.
    """

    finished_before: int
    lost: int
    again: int
    failed: int
    recovery_seconds: float
    seen: tuple[str, ...]


class FaultyHost(Callee):
    """Stands where a replica stands. Files in a folder tell it to misbehave, once each."""

    def __init__(self, place: Any, folder: str, seconds: float) -> None:
        self._place, self._folder, self._seconds = place, Path(folder), seconds
        if (self._folder / "broken" / place.node).exists():
            raise_on_call = RuntimeError("CUDA driver initialization failed (as told to)")
            self._failure: Exception | None = raise_on_call
        else:
            self._failure = None

    def call(self, method: str, *args: Any) -> Any:
        """Describe, evaluate, or make a large array."""
        if self._failure is not None:
            raise self._failure
        if method == "describe":
            return "stand-in"
        if method == "array":
            import numpy

            return numpy.full(args[1] // 8, args[0], numpy.float64)
        return self._evaluate(args[0])

    def _evaluate(self, plan: Any) -> Any:
        from ray_abliterate.replica.messages import Evaluation
        from ray_abliterate.search.score import Score, Scorecard

        own = {"pid": os.getpid(), "node": self._place.node}
        entry = {**own, "plan": plan.to_json(), "began": time.monotonic()}
        with (self._folder / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        time.sleep(3600 if self._once("hang") else self._seconds)
        if self._once("no-memory"):
            take_more_than_there_is()
        if self._once("no-device-memory"):
            import torch

            torch.empty(2**50, dtype=torch.int8, device="cuda")
        if self._once("hog"):
            import numpy

            held = numpy.ones(HOG_BYTES, numpy.int8)
            time.sleep(60)
            del held
        x = plan.profiles[0][1].peak / 2
        scores = (Score("rate", x, x, x), Score("kl", 1 - x, 1 - x, 1 - x))
        return Evaluation(Scorecard(scores), self._seconds)

    def _once(self, name: str) -> bool:
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True


class Study:
    """A search over stand-ins, and somebody who meddles with it."""

    def __init__(
        self,
        folder: Path,
        trials: int = 14,
        seconds: float = 0.4,
        timeout: float | None = None,
        **settings: Any,
    ) -> None:
        self.folder, self.trials, self.seconds, self.timeout = folder, trials, seconds, timeout
        own = {"replicas": 2, "gpus_per_replica": 0, "threads_per_replica": 1}
        self.settings = {"name": "stand-in", **own, **settings}
        self.ended: list[tuple[float, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.pool: Any = None
        self._errors: list[BaseException] = []

    def run(self, fault: Callable[["Study"], None], after: int = 3, together: int = 2) -> Outcome:
        """The search, with a fault once some trials have finished."""
        import ray

        from ray_abliterate.cluster.events import describe
        from ray_abliterate.cluster.pool import ReplicaPool
        from ray_abliterate.cluster.replica_actor import Hosting
        from ray_abliterate.cluster.tune_search import Search
        from ray_abliterate.recipe import ModelSettings, SearchSettings, SpaceSettings
        from ray_abliterate.search.plan import ModelShape, Space

        space = Space.of(ModelShape(8, 32, ("attn", "mlp")), SpaceSettings(), "none")
        own = ModelSettings.model_validate(self.settings)
        hosting = Hosting(FaultyHost, (str(self.folder), self.seconds), own)
        wanted = SearchSettings(trials=self.trials, dominance_stop=False)
        search = Search(self.folder / "study.journal", space, wanted, GOALS)  # type: ignore[arg-type]
        on_trial = lambda trial, answers: self.ended.append((time.monotonic(), trial))  # noqa: E731
        moment: list[float] = []
        with ReplicaPool.of(hosting, self.timeout, self.events.append) as self.pool:
            until(lambda: self.pool.replicas >= together)
            meddler = threading.Thread(target=self._meddle, args=(fault, after, moment))
            meddler.start()
            tell = lambda event, **details: self.events.append({"event": event, **details})  # noqa: E731
            search.run(self.pool, ray.put(None), (), on_trial, self.folder / "tune", tell)
            meddler.join()
            time.sleep(1.5)  # what happened last is heard a second later
        if self._errors:
            raise self._errors[0]
        seen = tuple(text for text in map(describe, self.events) if text)
        return self._outcome(moment[0], space, seen)

    def _meddle(self, fault: Callable[["Study"], None], after: int, moment: list[float]) -> None:
        try:
            until(lambda: len(self.ended) >= after)
            fault(self)
        except BaseException as error:  # noqa: BLE001  # raised by `run`
            self._errors.append(error)
        moment.append(time.monotonic())

    def _outcome(self, moment: float, space: Any, seen: tuple[str, ...]) -> Outcome:
        from ray_abliterate.search import study as journal

        storage = journal.open_storage(self.folder / "study.journal")
        held = journal.outcomes(journal.open_study(storage, [goal for _, goal in GOALS]), space)
        before = [trial.number for at, trial in self.ended if at <= moment]
        lost = set(before) - {trial.number for trial in held}
        check(not lost, f"trials {sorted(lost)} are lost")
        check(len(held) == self.trials, f"{len(held)} trials instead of {self.trials}")
        after = [at for at, _ in self.ended if at > moment]
        plans = [entry["plan"] for entry in self.evaluations()]
        return Outcome(
            len(before),
            len(lost),
            len(plans) - len(set(plans)),
            sum(trial.error is not None for trial in held),
            round(min(after, default=moment) - moment, 2),
            seen,
        )

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation that was begun."""
        file = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        check(time.monotonic() < deadline, "it did not happen in time")
        time.sleep(0.02)


def check(holds: bool, text: str) -> None:
    """Raise if something does not hold."""
    if not holds:
        raise AssertionError(text)


# Faults of replicas, trials and nodes: on the cluster that this process is connected to.


def replica_killed(folder: Path, cluster: Any) -> Outcome:
    """The process of a replica that evaluates is killed (as the kernel does without memory)."""
    return Study(folder).run(lambda study: os.kill(study.evaluations()[-1]["pid"], signal.SIGKILL))


def trial_process_killed(folder: Path, cluster: Any) -> Outcome:
    """The process of a trial slot is killed."""
    import psutil

    def kill(study: Study) -> None:
        ours = psutil.Process().children(recursive=True)
        slots = [p for p in ours if "PlanTrial" in " ".join(p.cmdline()[:1])]
        slots[0].kill()

    return Study(folder).run(kill)


def pool_killed(folder: Path, cluster: Any) -> Outcome:
    """The process of the pool is killed, and its replicas go with it."""
    import psutil

    def kill(study: Study) -> None:
        ours = psutil.Process().children(recursive=True)
        [pool] = [p for p in ours if "PoolActor" in " ".join(p.cmdline()[:1])]
        pool.kill()

    return Study(folder).run(kill)


def replica_hangs(folder: Path, cluster: Any) -> Outcome:
    """A replica does not answer any more; `search.trial_timeout_seconds` is 2."""
    return Study(folder, timeout=2.0).run(lambda study: (folder / "hang").touch())


def no_memory_in_a_replica(folder: Path, cluster: Any) -> Outcome:
    """An evaluation gets no memory, though batches were halved."""
    return Study(folder).run(lambda study: (folder / "no-memory").touch())


def take_more_than_there_is() -> None:
    """Ask for more memory than this process may have.

    Raises:
        MemoryError: as the system does.
    """
    import psutil

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + HOG_BYTES // 4, before[1]))
    try:
        bytearray(HOG_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def no_memory_on_a_device(folder: Path, cluster: Any) -> Outcome:
    """An evaluation asks its GPU for more memory than it has."""
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        study = Study(folder, replicas=2, gpus_per_replica=0.5)
        return study.run(lambda study: (folder / "no-device-memory").touch())
    finally:
        cluster.remove_node(node)


def node_out_of_memory(folder: Path, cluster: Any) -> Outcome:
    """A replica takes more memory than its node has to give, and is killed for it by Ray."""
    import psutil

    memory = psutil.virtual_memory()
    most = (memory.total - memory.available + 0.6 * HOG_BYTES) / memory.total
    low = {"RAY_memory_usage_threshold": f"{most:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    node = cluster.add_node(num_cpus=1, num_gpus=1, env_vars=low)
    try:
        study = Study(folder, replicas=1, gpus_per_replica=1)
        return study.run(lambda study: (folder / "hog").touch(), together=1)
    finally:
        cluster.remove_node(node)


def node_removed(folder: Path, cluster: Any) -> Outcome:
    """A node is gone at once, with its replica, and another joins."""
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    try:

        def remove(study: Study) -> None:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))

        study = Study(folder, trials=30, replicas=None, gpus_per_replica=1)
        found = study.run(remove)
        used = {entry["node"] for entry in study.evaluations()}
        check(len(used) == 3, f"{len(used)} nodes were used, not 3")
        return found
    finally:
        for node in nodes:
            cluster.remove_node(node)


def node_joined(folder: Path, cluster: Any) -> Outcome:
    """Not a fault: a node joins, and the search makes room for one trial more at a time."""
    from ray_abliterate.cluster import tune_search as search

    nodes = [cluster.add_node(num_cpus=1, num_gpus=1)]
    before, search.GROWTH_SECONDS = search.GROWTH_SECONDS, 1.0
    try:
        study = Study(folder, trials=40, seconds=0.5, replicas=None, gpus_per_replica=1)
        join = lambda study: nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))  # noqa: E731
        found = study.run(join, together=1)
        began = sorted(entry["began"] for entry in study.evaluations())
        pairs = sum(b - a < 0.7 * study.seconds for a, b in itertools.pairwise(began))
        check(pairs >= 5, f"only {pairs} trials began beside another")
        return found
    finally:
        search.GROWTH_SECONDS = before
        for node in nodes:
            cluster.remove_node(node)


def broken_node(folder: Path, cluster: Any) -> Outcome:
    """Replicas can't be started on one of two nodes."""
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    (folder / "broken" / nodes[0].node_id).mkdir(parents=True)
    try:
        study = Study(folder, replicas=None, gpus_per_replica=1)
        found = study.run(lambda study: None, together=1)
        check({e["node"] for e in study.evaluations()} == {nodes[1].node_id}, "wrong node")
        return found
    finally:
        for node in nodes:
            cluster.remove_node(node)


def object_store_full(folder: Path, cluster: Any) -> Outcome:
    """A node holds five times what its object store does: Ray spills to its disk."""
    import ray

    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
    try:

        def fill(study: Study) -> None:
            size = 10_000_000
            held = [
                study.pool.actor.call_by_reference.remote("array", [i, size]) for i in range(40)
            ]
            for i, reference in enumerate(held):
                array = ray.get(ray.get(reference)[0])
                check(bool((array == i).all()) and array.nbytes == size, f"array {i} is damaged")
                del array

        return Study(folder, replicas=1, gpus_per_replica=1).run(fill, together=1)
    finally:
        cluster.remove_node(node)


# Faults of the driver, its files and its clock: on runs of the command line.

RECIPE = """
[model]
name = "planted"
threads_per_replica = 1
[prompts.behaviour]
builtin = "cooking-train"
split = "[:16]"
[prompts.neutral]
builtin = "other-train"
split = "[:16]"
[search]
trials = {trials}
[run]
dashboard = false
batch_size = 4
[[scorers]]
kind = "keyword-rate"
prompts = {{ builtin = "cooking-heldout", split = "[:8]" }}
markers = ["sorry"]
max_new_tokens = 3
[[scorers]]
kind = "kl-divergence"
prompts = {{ builtin = "other-heldout", split = "[:8]" }}
"""


class CliRun:
    """A run of the command line that can be stopped and taken up."""

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, trials: int = 60
    ) -> None:
        self.folder, self.trials = folder, trials
        self.directory = folder / "run"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            **(environment or {}),
        }
        self._environment.pop("RAY_ADDRESS", None)
        (folder / "recipe.toml").write_text(RECIPE.format(trials=trials))
        self.output = ""
        self.finished()  # what it imports takes longer than a few trials

    def start(self) -> subprocess.Popen[str]:
        """Run, or resume."""
        begun = (self.directory / "recipe.resolved.json").exists()
        verb = ["resume", "run"] if begun else ["run", "recipe.toml", "--to", "run"]
        return subprocess.Popen(
            [sys.executable, "-m", "ray_abliterate", *verb],
            cwd=self.folder, env=self._environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finished(self) -> dict[int, str]:
        """The trials of the journal that have ended, and what it holds of each."""
        from ray_abliterate.pipeline.directory import RunDirectory
        from ray_abliterate.search import study as journal
        from ray_abliterate.search.plan import ModelShape, Space

        if not (self.directory / "study.journal").exists():
            return {}
        copy = self.folder / "copy.journal"
        shutil.copy(self.directory / "study.journal", copy)
        directory = RunDirectory.open(self.directory)
        facts, recipe = directory.environment["model"], directory.recipe
        shape = ModelShape(facts["layers"], facts["hidden"], tuple(facts["components"]))
        space = Space.of(shape, recipe.search.space, recipe.edit.norm)
        study = journal.open_study(journal.open_storage(copy), [goal for _, goal in GOALS])
        return {trial.number: trial.to_json() for trial in journal.outcomes(study, space)}

    def directions(self) -> Any:
        """All their numbers."""
        from ray_abliterate.pipeline.directory import RunDirectory

        found = RunDirectory.open(self.directory).directions()
        return found.vectors.tolist() if found is not None else None

    def count(self) -> int:
        """Trials listed so far."""
        file = self.directory / "trials.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def to_the_end(self) -> float:
        """Resume until it is done; seconds until the next trial was there."""
        before, began = self.count(), time.monotonic()
        process = self.start()
        until(lambda: self.count() > before or process.poll() is not None)
        seconds = time.monotonic() - began
        self.output += process.communicate(timeout=PATIENCE_SECONDS)[0]
        check(process.returncode == 0, self.output)
        self.is_whole()
        return round(seconds, 2)

    def is_whole(self) -> None:
        """Every trial is there, and none too many."""
        found = len(self.finished())
        check(found == self.trials, f"{found} trials instead of {self.trials}: {self.output}")

    def compare(self, before: dict[int, str]) -> int:
        """Trials of before that are not there, as they were, now."""
        now = self.finished()
        lost = [number for number, text in before.items() if now.get(number) != text]
        check(not lost, f"trials {lost} are lost")
        return len(lost)

    def unfinished(self) -> int:
        """Trials that were begun, and are done again under another number."""
        lines = (self.directory / "study.journal").read_text().splitlines()
        return sum('"interrupted":true' in line.replace(" ", "") for line in lines)


def driver_killed(folder: Path, cluster: Any, times: int = 10) -> Outcome:
    """The driver is killed at ten random moments, half of them before any trial, and resumed."""
    run, chance = CliRun(folder, trials=20 + 15 * times), random.Random(7)
    finished: dict[int, str] = {}
    lost = 0
    for attempt in range(times):
        process, before = run.start(), run.count()
        if attempt % 2:
            until(lambda before=before: run.count() > before)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 1.0 if attempt % 2 else 10.0))
        running = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        check(running, said)
        lost += run.compare(finished)
        finished = run.finished()
    seconds = run.to_the_end()
    lost += run.compare(finished)
    return Outcome(len(finished), lost, run.unfinished(), 0, seconds, ())


def terminated(folder: Path, cluster: Any) -> Outcome:
    """The machine is about to be taken away: SIGTERM, then a grace period."""
    run = CliRun(folder)
    process = run.start()
    until(lambda: run.count() >= 5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    run.output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    check(process.returncode == 130, run.output)
    last = tuple(line for line in run.output.splitlines() if "Go on with" in line)
    check(bool(last), run.output)
    finished = run.finished()
    run.to_the_end()
    lost = run.compare(finished)
    ended = (f"ended {seconds:.1f} s after the signal", *last)
    return Outcome(len(finished), lost, run.unfinished(), 0, round(seconds, 2), ended)


def disk_full(folder: Path, cluster: Any) -> Outcome:
    """The run directory takes no byte more for a while (a limit on the size of files)."""
    run = CliRun(folder)
    process = run.start()
    until(lambda: run.count() >= 5)
    size = (run.directory / "study.journal").stat().st_size
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
    finished = run.finished()
    time.sleep(12.0)  # Tune writes its state every ten seconds, if it is allowed to
    check(process.poll() is None, "the driver ended")
    stuck = run.count()
    began = time.monotonic()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: run.count() > stuck or process.poll() is not None)
    seconds = time.monotonic() - began
    run.output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    check(process.returncode == 0, run.output)
    run.is_whole()
    seen = tuple(line for line in run.output.splitlines() if "can't be written" in line)
    check(bool(seen), run.output)
    return Outcome(len(finished), run.compare(finished), 0, 0, round(seconds, 2), seen[:1])


def two_drivers(folder: Path, cluster: Any) -> Outcome:
    """A second driver is started on a run directory that is in use."""
    run = CliRun(folder, trials=400)
    process = run.start()
    until(lambda: run.count() >= 3)
    finished, began = run.finished(), time.monotonic()
    second = run.start()
    said, _ = second.communicate(timeout=60)
    seconds = time.monotonic() - began
    check(second.returncode == 2 and "in use" in said, said)
    check(process.poll() is None, "the first driver ended before it was disturbed")
    process.send_signal(signal.SIGTERM)
    run.output, _ = process.communicate(timeout=60)
    check(process.returncode == 130, run.output)
    seen = tuple(said.strip().splitlines()[-1:])
    return Outcome(len(finished), run.compare(finished), 0, 0, round(seconds, 2), seen)


def torn_journal(folder: Path, cluster: Any) -> Outcome:
    """The power goes while a line of the journal is written."""
    run = CliRun(folder)
    process = run.start()
    until(lambda: run.count() >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished, journal = run.finished(), run.directory / "study.journal"
    *whole, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole) + last + last[: len(last) // 2])
    seconds = run.to_the_end()
    return Outcome(len(finished), run.compare(finished), run.unfinished(), 0, seconds, ())


def damaged_shard(folder: Path, cluster: Any) -> Outcome:
    """A residual shard in the cache is cut in half between two runs."""
    cache = {"RAY_ABLITERATE_CACHE": str(folder / "cache")}
    first = CliRun(folder, cache, trials=8)
    first.to_the_end()
    shard = next((folder / "cache" / "residuals").rglob("*.arrow"))
    data = shard.read_bytes()
    shard.unlink()  # the run directory has the same file under another name
    shard.write_bytes(data[: len(data) // 2])
    (folder / "second").mkdir()
    second = CliRun(folder / "second", cache, trials=8)
    seconds = second.to_the_end()
    check(first.directions() == second.directions(), "other directions")
    said = " ".join(second.output.split())  # the terminal's lines are wrapped
    check("is damaged and is made again" in said, second.output)
    seen = "warning: … is damaged and is made again: …"
    return Outcome(8, first.compare(first.finished()), 0, 0, seconds, (seen,))


# Ray's core is spared: its waits are measured by the kernel's clock, which can't be moved here.
CLOCK = """
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
    """The clock of all Python processes jumps a day ahead, then two hours behind."""
    (folder / "clock.c").write_text(CLOCK)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", "clock.so", "clock.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    ahead, behind = folder / "ahead", folder / "behind"
    shim = {"LD_PRELOAD": str(folder / "clock.so")}
    jumps = {"CLOCK_AHEAD": str(ahead), "CLOCK_BEHIND": str(behind)}
    run = CliRun(folder, shim | jumps, trials=50)
    process = run.start()
    until(lambda: run.count() >= 3)
    finished, began, count = run.finished(), time.monotonic(), run.count()
    ahead.touch()
    until(lambda: run.count() > count + 3 or process.poll() is not None)
    seconds = time.monotonic() - began
    ahead.unlink()
    behind.touch()
    check(
        len(finished) < run.trials and process.poll() is None, "it was over before the clock jumped"
    )
    run.output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    check(process.returncode == 0, run.output)
    run.is_whole()
    return Outcome(len(finished), run.compare(finished), 0, 0, round(seconds, 2), ())


ON_CLUSTER = (
    replica_killed,
    trial_process_killed,
    pool_killed,
    replica_hangs,
    no_memory_in_a_replica,
    node_out_of_memory,
    no_memory_on_a_device,
    node_removed,
    node_joined,
    broken_node,
    object_store_full,
)
ON_COMMAND_LINE = (
    driver_killed,
    terminated,
    disk_full,
    two_drivers,
    torn_journal,
    damaged_shard,
    clock_jumps,
)


@contextmanager
def small_cluster() -> Iterator[Any]:
    """A head without GPUs; scenarios add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 6, "include_dashboard": False}
    # Hooks for the end of the process could only be set in the main thread; scenarios add nodes in
    # another.
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=arguments)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Do them, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [scenario.__name__ for scenario in (*ON_CLUSTER, *ON_COMMAND_LINE)]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    import torch

    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        cluster = stack.enter_context(small_cluster())
        for scenario in (*ON_CLUSTER, *ON_COMMAND_LINE):
            if options.names and scenario.__name__ not in options.names:
                continue
            if scenario is no_memory_on_a_device and not torch.cuda.is_available():
                print(f"{scenario.__name__}: not done, there is no GPU")
                continue
            with tempfile.TemporaryDirectory(prefix="fault-") as scratch:
                outcome = scenario(Path(scratch), cluster)
            what = (scenario.__doc__ or "").strip()
            figures[scenario.__name__] = {"fault": what, **asdict(outcome)}
            print(f"{scenario.__name__}: {outcome}", flush=True)
    if not options.names:
        print(save("faults", figures))
    print(f"finished trials lost: {sum(entry['lost'] for entry in figures.values())}")


if __name__ == "__main__":
    main()
