"""Check what every run needs of a machine: libraries, devices, memory, disks, folders."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from ray_abliterate.cli.check import Check, State
from ray_abliterate.data.builtin import demo_model
from ray_abliterate.model.devices import (
    cpu_cores,
    gpu_memory,
    nearest_existing_folder,
    ram_available,
)
from ray_abliterate.pipeline.replicas import LIBRARIES

GB = 1e9
LITTLE_DISK = 5 * GB
LITTLE_RAM = 4 * GB
TIGHT = 0.85
"""Share of a memory from which on it is taken for full: estimates are no better."""


def check_machine() -> Iterator[Check]:
    """Yield the checks that need no recipe."""
    yield check_libraries()
    yield check_devices()
    yield check_ram()
    yield from check_disks()
    yield check_demo_model()
    yield check_hub_token()
    yield check_run_folder()
    if address := os.environ.get("RAY_ADDRESS"):
        finding = f"RAY_ADDRESS = {address}: runs go to that cluster; this table is of this machine"
        yield Check("cluster", "warn", finding, "Run doctor on the cluster's nodes too.")


def check_libraries() -> Check:
    """Return the versions of Python and of the libraries that matter most."""
    from packaging.requirements import Requirement

    try:
        required = {r.name: r for r in map(Requirement, requires("ray-abliterate") or ())}
    except PackageNotFoundError:  # a checkout that was not installed declares nothing
        required = {}
    finding, wrong = [f"Python {sys.version.split()[0]}"], []
    for library in LIBRARIES:
        try:
            installed = version(library)
        except PackageNotFoundError:
            finding.append(f"{library} missing")
            wrong.append(library)
            continue
        finding.append(f"{library} {installed}")
        if library in required and not required[library].specifier.contains(
            installed, prereleases=True
        ):
            wrong.append(str(required[library]))
    fix = f"pip install --upgrade {' '.join(repr(name) for name in wrong)}"
    return Check("libraries", "FAIL" if wrong else "ok", ", ".join(finding), fix)


def check_devices() -> Check:
    """Return what torch can compute on."""
    cores = f"{cpu_cores()} CPU cores"
    if torch.cuda.is_available():
        cards = [
            f"{torch.cuda.get_device_name(i)} ({free / GB:.0f} of {total / GB:.0f} GB free)"
            for i, (free, total) in enumerate(gpu_memory())
        ]
        is_used = any(free < TIGHT * total for free, total in gpu_memory())
        fix = "Other processes hold GPU memory; see nvidia-smi."
        return Check("devices", "warn" if is_used else "ok", f"{', '.join(cards)}; {cores}", fix)
    if torch.backends.mps.is_available():
        return Check("devices", "ok", f"Apple GPU (MPS); {cores}")
    built = f" (built for CUDA {torch.version.cuda})" if torch.version.cuda else ""
    fix = "Small models only. If this machine has a GPU, check its driver and torch's build."
    return Check("devices", "warn", f"torch {torch.__version__}{built} sees no GPU; {cores}", fix)


def check_ram() -> Check:
    """Return how much RAM is free, and warn below 4 GB."""
    free = ram_available()
    fix = "Close other programs; even a small model needs more."
    return Check(
        "memory", "warn" if free < LITTLE_RAM else "ok", f"{free / GB:.1f} GB of RAM free", fix
    )


def check_disks() -> Iterator[Check]:
    """Yield how much space is free where models and runs go, and warn below 5 GB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("model cache", Path(HF_HUB_CACHE)), ("working folder", Path.cwd())):
        free = shutil.disk_usage(nearest_existing_folder(folder)).free
        state: State = "warn" if free < LITTLE_DISK else "ok"
        fix = "Free some space" + (", or set HF_HOME." if name == "model cache" else ".")
        yield Check(name, state, f"{folder}: {free / GB:.1f} GB free", fix)


def check_demo_model() -> Check:
    """Return whether the demo's weights are installed."""
    try:
        file = demo_model.gguf_file()
    except demo_model.DemoUnavailable:
        finding = "not installed; the tiny planted model would stand in for it"
        return Check("demo model", "warn", finding, demo_model.INSTALL_COMMAND)
    return Check("demo model", "ok", file.name)


def check_hub_token() -> Check:
    """Return whether gated models could be read; the token itself is never shown."""
    from huggingface_hub import get_token

    finding = "present" if get_token() else "none; only gated or private models need one"
    return Check("Hub token", "ok", finding)


def check_run_folder() -> Check:
    """Return whether `runs/` could be written here."""
    folder = nearest_existing_folder(Path("runs").absolute())
    is_writable = os.access(folder, os.W_OK)
    finding = f"{folder} is {'' if is_writable else 'not '}writable"
    return Check(
        "run folder", "ok" if is_writable else "FAIL", finding, "Use --to, or another folder."
    )
