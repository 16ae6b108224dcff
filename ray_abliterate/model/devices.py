"""What this machine has to offer a run. Knows nothing about models."""

import os
import sys
from pathlib import Path

import torch


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def gpu_memory() -> list[tuple[int, int]]:
    """Free and total bytes of each CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(i) for i in range(count)]


def ram_available() -> int:
    """Bytes of RAM that can be had, within a container's limit if there is one."""
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # No container, or one without a limit ("max").
        return free


def standing(folder: Path) -> Path:
    """The nearest folder that exists, upwards from an absolute path."""
    return next(place for place in (folder, *folder.parents) if place.exists())
