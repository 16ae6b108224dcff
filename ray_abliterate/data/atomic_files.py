"""Files that are written atomically, whole or line by line, and the folder of cached ones.

A reader sees a whole file or none, also after a crash. Knows nothing about what files hold.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """Return the folder of files that outlive a run.

    It is `$RAY_ABLITERATE_CACHE`, or `ray_abliterate` in `$XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get("RAY_ABLITERATE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "ray_abliterate"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it."""

    def fill(name: Path) -> None:
        with name.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name.chmod(0o644)

    _replace_with(path, fill)


def link_atomically(path: Path, source: Path) -> None:
    """Hard-link a file under a second name; copy it where the file system has no hard links."""

    def fill(name: Path) -> None:
        name.unlink()
        try:
            os.link(source, name)
        except OSError:
            shutil.copyfile(source, name)

    _replace_with(path, fill)


def read_json_lines(file: Path) -> tuple[dict[str, Any], ...]:
    """Read the objects of an append-only file, one a line; torn lines are skipped."""
    objects = []
    for line in file.read_text("utf-8", errors="replace").split("\n") if file.exists() else []:
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    return tuple(objects)


def append_line(path: Path, line: str) -> None:
    """Append a line and flush it; a torn line before it stays on a line of its own."""
    with path.open("ab+") as file:
        if file.tell() and not _ends_line(file):
            file.write(b"\n")
        file.write(line.encode(errors="backslashreplace") + b"\n")
        file.flush()


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _replace_with(path: Path, fill: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, text = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    name = Path(text)
    try:
        fill(name)
        os.replace(name, path)
    finally:
        # also after a rename onto another name of the same file, which does nothing
        name.unlink(missing_ok=True)
