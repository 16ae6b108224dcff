"""Figures as JSON files under `results/`, each with its command, date, machine and versions."""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def save(file: str, figures: dict[str, Any]) -> Path:
    """Write figures, together with what produced them, to a file under `results/`.

    Args:
        file: Name of the JSON file without its ending.
        figures: What was measured.

    Returns:
        The file's path.
    """
    record = {
        "command": " ".join([f"python -m {_running_module()}", *map(_shown, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": _processor(),
            "cores": cores(),
            "matrix_units": _matrix_units(),
            **_gpu(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "ray", "optuna")},
        "figures": figures,
    }
    path = RESULTS / f"{file}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def saved(file: str) -> dict[str, Any]:
    """Return the figures in a file under `results/`, named without its ending."""
    path = RESULTS / f"{file}.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _running_module() -> str:
    """Return the benchmark's module, as `python -m` was given it."""
    spec = sys.modules["__main__"].__spec__
    return (spec.name if spec else "benchmarks").removesuffix(".__main__")


def _shown(argument: str) -> str:
    """Return an argument as it is saved: folders of one machine mean nothing on another."""
    return "…" if Path(argument).is_absolute() else argument


def _processor() -> str:
    names = [line for line in _cpu_lines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _matrix_units() -> list[str]:
    """Return instructions that make bfloat16 products fast; they decide the ratio to float32."""
    flags = next((line.split() for line in _cpu_lines() if line.startswith("flags")), [])
    return [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _gpu() -> dict[str, str]:
    """Return the GPU's name, if the benchmark has used torch and there is one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name()}


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
