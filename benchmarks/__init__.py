"""Benchmarks: each writes a JSON file with its command, versions and machine into `results/`."""

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def save(name: str, figures: dict[str, Any]) -> Path:
    """Keep figures beside what produced them."""
    record = {
        "command": " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": _cores()},
        "versions": {p: version(p) for p in ("torch", "transformers", "ray", "optuna")},
        "figures": figures,
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
