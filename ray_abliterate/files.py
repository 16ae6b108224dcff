"""Files that are written whole, and the folder of those that outlive a run."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$RAY_ABLITERATE_CACHE`, or `ray_abliterate` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("RAY_ABLITERATE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ray_abliterate"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it."""

    def fill(name: Path) -> None:
        with name.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name.chmod(0o644)

    _appear(path, fill)


def link_whole(path: Path, source: Path) -> None:
    """Give a file a second name; copy it where the file system can't do that."""

    def fill(name: Path) -> None:
        name.unlink()
        try:
            os.link(source, name)
        except OSError:
            shutil.copyfile(source, name)

    _appear(path, fill)


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
