"""Where Ray's workers find the package and the recipe's own modules."""

import os
import site
from pathlib import Path

import pytest

from ray_abliterate.cluster import connection
from ray_abliterate.cluster.connection import workers_path

HOME = Path(connection.__file__).resolve().parents[2]


def test_workers_get_absolute_paths_in_order_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["lib", "", "/opt/own", str(HOME), "lib"]))
    found = workers_path(("recipes",)).split(os.pathsep)
    assert found == [str(tmp_path / "recipes"), str(tmp_path / "lib"), "/opt/own", str(HOME)]


def test_workers_find_the_package_in_a_folder_that_only_the_driver_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(site, "getsitepackages", lambda: ["/usr/lib/python3/dist-packages"])
    assert workers_path() == str(HOME)


def test_an_installed_package_is_not_named_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder would come before Python's own library."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(HOME)])
    assert workers_path() == ""
