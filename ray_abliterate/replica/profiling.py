"""A profile of one trial: where time and memory go, as a trace and a table of stages.

The trace opens in Perfetto (https://ui.perfetto.dev) or `chrome://tracing`.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STAGES = ("edit", "prompts", "drafts", "decode", "restore")
"""Names under which the code marks stages; the rest is `else`: texts, verdicts, scores."""


@dataclass(frozen=True)
class ProfileStage:
    """One stage of a trial.

    Attributes:
        name: One of `STAGES`, or `else`.
        passes: How often it was entered.
        seconds: Time on the host, waiting included.
        device_seconds: Time of the device's own events; 0 without a GPU.
        kept_bytes: Bytes that were allocated in it and not freed by its end.
    """

    name: str
    passes: int
    seconds: float
    device_seconds: float
    kept_bytes: int


@dataclass(frozen=True)
class TrialProfile:
    """The stages of a trial, and its trace.

    Attributes:
        seconds: Time of the whole trial.
        stages: The stages, and `else`.
        trace: Compressed JSON.
    """

    seconds: float
    stages: tuple[ProfileStage, ...]
    trace: bytes

    def table(self) -> str:
        """Return the stages as text, a line each."""
        lines = [f"{'stage':<9} {'passes':>6} {'seconds':>8} {'share':>6} {'GPU s':>7} {'MB':>8}"]
        for stage in self.stages:
            share = stage.seconds / self.seconds if self.seconds else 0.0
            lines.append(
                f"{stage.name:<9} {stage.passes:>6} {stage.seconds:>8.3f} {share:>6.1%} "
                f"{stage.device_seconds:>7.3f} {stage.kept_bytes / 1e6:>8.1f}"
            )
        return "\n".join([*lines, f"{'in all':<9} {'':>6} {self.seconds:>8.3f}"])


def profile_stages(work: Callable[[], object]) -> TrialProfile:
    """Do some work under torch's profiler, which slows it down somewhat."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.json.gz"
        profiler.export_chrome_trace(str(file))
        trace = file.read_bytes()
    events = {event.key: event for event in profiler.key_averages() if event.key in STAGES}
    stages = [_stage(name, events[name]) for name in STAGES if name in events]
    rest = max(0.0, seconds - sum(stage.seconds for stage in stages))
    return TrialProfile(seconds, (*stages, ProfileStage("else", 1, rest, 0.0, 0)), trace)


def _stage(name: str, event: Any) -> ProfileStage:
    return ProfileStage(
        name,
        int(event.count),
        event.cpu_time_total / 1e6,
        event.device_time_total / 1e6,
        max(0, int(event.cpu_memory_usage)) + max(0, int(event.device_memory_usage)),
    )
