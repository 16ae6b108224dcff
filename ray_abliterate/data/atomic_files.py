"""Files that are written whole or line by line, and the folder of those that outlive a run."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """`$RAY_ABLITERATE_CACHE`, or `ray_abliterate` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("RAY_ABLITERATE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ray_abliterate"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it."""

    def fill(name: Path) -> None:
        with name.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name.chmod(0o644)

    _appear(path, fill)


def link_atomically(path: Path, source: Path) -> None:
    """Give a file a second name; copy it where the file system can't do that."""

    def fill(name: Path) -> None:
        name.unlink()
        try:
            os.link(source, name)
        except OSError:
            shutil.copyfile(source, name)

    _appear(path, fill)


def read_json_lines(file: Path) -> tuple[dict[str, Any], ...]:
    """The objects of an append-only file, a line each; a torn line is skipped."""
    found = []
    for line in file.read_text("utf-8", errors="replace").split("\n") if file.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return tuple(found)


def append_line(path: Path, line: str) -> None:
    """Add a line; one that was torn before it stays alone on its own."""
    with path.open("ab+") as file:
        if file.tell() and not _ends_line(file):
            file.write(b"\n")
        file.write(line.encode(errors="backslashreplace") + b"\n")
        file.flush()


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _appear(path: Path, fill: Callable[[Path], None]) -> None:
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
