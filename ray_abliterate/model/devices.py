"""What this machine and its accelerators offer: cores, memory, and where a module computes.

Knows nothing about prompts, batches or edits.
"""

import gc
import os
import sys
from pathlib import Path

import torch
from torch import nn

SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.7}
"""Share of the free memory that batches may take: on a CPU other replicas and programs need the
rest."""


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def gpu_memory() -> list[tuple[int, int]]:
    """Return the free and the total bytes of each CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(i) for i in range(count)]


def ram_available() -> int:
    """Return the bytes of RAM that are available, within a container's limit if there is one."""
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def nearest_existing_folder(folder: Path) -> Path:
    """Return the absolute path `folder` itself if it exists, else its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, even if its weights are offloaded until then."""
    hook = getattr(module, "_hf_hook", None)  # accelerate's, of an offloaded module
    if getattr(hook, "execution_device", None) is not None:
        return torch.empty(0, device=hook.execution_device).device  # type: ignore[union-attr]
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that batches may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch's caching allocator keeps blocks that no tensor uses
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_FREE["cuda"] * free)
    if device.type == "mps":
        room = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return int(SHARE_OF_FREE["cuda"] * room)
    import psutil

    return int(SHARE_OF_FREE["cpu"] * psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def release_unused_memory() -> None:
    """Return unused memory to the system. It is slow, so call it only after memory ran out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
