"""Optuna's journal: in memory at once, on the disk in order, whole lines or none."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ray_abliterate.search.journal import MemoryJournal


def study_in(backend: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(backend)
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)


def ask_and_tell(study: Any, count: int) -> None:
    for number in range(count):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        trial.set_user_attr("note", ["a", number])
        study.tell(trial, number)


def test_the_file_is_what_optunas_own_backend_writes_and_reads(tmp_path: Path) -> None:
    ask_and_tell(study_in(MemoryJournal(tmp_path / "ours")), 3)
    theirs = study_in(JournalFileBackend(str(tmp_path / "ours"))).get_trials()
    again = study_in(MemoryJournal(tmp_path / "ours")).get_trials()
    assert [t.params for t in theirs] == [t.params for t in again]
    assert [t.user_attrs for t in again] == [{"note": ["a", n]} for n in range(3)]
    assert [t.values for t in again] == [[0.0], [1.0], [2.0]]


def test_nothing_waits_for_the_disk(tmp_path: Path) -> None:
    waiting: list[Callable[[], None]] = []
    study = study_in(MemoryJournal(tmp_path / "journal", waiting.append))
    ask_and_tell(study, 2)
    assert not (tmp_path / "journal").exists()
    assert len(study.get_trials()) == 2
    for work in waiting:
        work()
    assert len(study_in(MemoryJournal(tmp_path / "journal")).get_trials()) == 2


def test_a_write_that_fails_half_way_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "journal"
    waiting: list[Callable[[], None]] = []
    ask_and_tell(study_in(MemoryJournal(file)), 1)
    before = file.read_bytes()
    ask_and_tell(study_in(MemoryJournal(file, waiting.append)), 1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            waiting[0]()
    assert file.read_bytes() == before
    for work in waiting:
        work()
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert len(study_in(MemoryJournal(file)).get_trials()) == 2
