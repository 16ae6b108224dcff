"""Folders that cannot take an export."""

import os
from contextlib import contextmanager

import pytest

from ray_abliterate.errors import ExportError
from ray_abliterate.export.output_folder import open_partial, refuse_unfit_target

NOBODY = 65534


@contextmanager
def unprivileged():
    """Someone who may not write everywhere, also where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_parent_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    to = tmp_path / "out"
    with (
        unprivileged(),
        pytest.raises(ExportError, match=r"cannot be written \(Permission denied\).*--to"),
        open_partial(to, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_may_not_be_read_is_refused(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o000)
    with unprivileged(), pytest.raises(ExportError, match=r"\(Permission denied\).*--to"):
        refuse_unfit_target(hidden / "some" / "out", tmp_path / "model", 0)


def test_files_in_the_target_are_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    refuse_unfit_target(tmp_path / "out", tmp_path / "model", 0)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        refuse_unfit_target(tmp_path / "out", tmp_path / "model", 0)
