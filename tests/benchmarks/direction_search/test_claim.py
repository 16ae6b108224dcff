"""The comparison of direction methods as a command: it resumes, and its tables render."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.direction_search import claim
from benchmarks.direction_search.hypervolumes import read
from benchmarks.harness.claim import Claim


def test_a_comparison_resumes_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(Claim, "save", lambda self, figures, *_: saved.append(figures))
    methods = ["mean-difference", "whitened"]
    command = ["x", "--models", "clean", "--trials", "3", "--seeds", "2", "--part", "methods"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods, "--work", str(tmp_path)])
    claim.main()
    file = tmp_path / claim.SEARCHES
    first, lines = read(file), file.read_text().splitlines()
    assert len(lines) == 4
    file.write_text("\n".join(lines[:3]) + "\n")
    capsys.readouterr()
    claim.main()
    assert "4 searches, 3 of them are finished" in capsys.readouterr().out
    assert {job: o.found for job, o in read(file).items()} == {j: o.found for j, o in first.items()}
    assert saved[0]["methods"] == saved[1]["methods"]
    table = claim.methods_table(json.loads(json.dumps(saved[0])), ("clean",))
    assert [line.split("`")[1] for line in table[2:4]] == methods
    assert "2 seeds" in table[-1]
    assert claim.methods_table(saved[0], ("demo",)) == []
