"""Benchmarks: each writes a JSON file with its command, versions and machine into `results/`."""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def save(name: str, figures: dict[str, Any], file: str = "") -> Path:
    """Keep figures beside what produced them.

    Args:
        name: The benchmark.
        figures: What it found.
        file: Name of the JSON file without its ending; the benchmark's if unset.
    """
    record = {
        "command": " ".join([f"python -m {_running()}", *map(_shown, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": _processor(),
            "cores": cores(),
            "matrix_units": _matrix_units(),
            **_gpu(),
        },
        "versions": {p: version(p) for p in ("torch", "transformers", "ray", "optuna")},
        "figures": figures,
    }
    path = Path(__file__).parents[1] / "results" / f"{file or name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _running() -> str:
    """The benchmark's module, as `python -m` was given it."""
    spec = sys.modules["__main__"].__spec__
    return (spec.name if spec else "benchmarks").removesuffix(".__main__")


def _shown(argument: str) -> str:
    """An argument as figures keep it: folders of one machine mean nothing on another."""
    return "…" if Path(argument).is_absolute() else argument


def saved(file: str) -> dict[str, Any]:
    """The figures that a file under `results/` holds."""
    path = Path(__file__).parents[1] / "results" / f"{file}.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    names = [line for line in _cpu_lines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _matrix_units() -> list[str]:
    """Instructions that bfloat16 products are fast with; they decide its ratio to float32."""
    flags = next((line.split() for line in _cpu_lines() if line.startswith("flags")), [])
    return [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _gpu() -> dict[str, str]:
    """The GPU, where the benchmark has used torch and there is one."""
    torch = sys.modules.get("torch")
    found = torch is not None and torch.cuda.is_available()
    return {"gpu": torch.cuda.get_device_name()} if found and torch is not None else {}


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
