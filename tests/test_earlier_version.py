"""What version 0.1.0 wrote before its modules stood in rooms still opens.

`support/earlier_version/` was written by that version's commands: a run on the planted model of
six trials with a suite, and the bundles of a merged export and of an adapter of its trial 0.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_abliterate.pipeline.directory import RunDirectory

EARLIER = Path(__file__).parent / "support" / "earlier_version"


def ray_abliterate(*arguments: str | Path) -> str:
    """What a command prints on stdout; it has to end well."""
    command = [sys.executable, "-m", "ray_abliterate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, for commands that write into it."""
    return Path(shutil.copytree(EARLIER / "run", tmp_path / "run"))


def test_a_run_is_read_as_data(run: Path) -> None:
    trials = RunDirectory(run).trials()
    recorded = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert [trial.number for trial in trials] == [row["number"] for row in recorded]
    for trial, row in zip(trials, recorded, strict=True):
        assert json.loads(trial.plan.to_json()) == row["plan"]
        assert [score.to_dict() for score in trial.scorecard.scores] == row["scores"]


def test_a_run_is_shown(run: Path) -> None:
    shown = ray_abliterate("show", run)
    assert "6 trials, 1 stopped early, 0 failed" in shown
    assert "attn" in ray_abliterate("show", run, "--trial", "4")


def test_a_run_is_reported_with_its_suites(run: Path) -> None:
    ray_abliterate("report", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in page and "keyword-rate" in page


def test_a_trial_is_exported_and_gives_its_scores(run: Path, tmp_path: Path) -> None:
    ray_abliterate("export", run, "--trial", "0", "--to", tmp_path / "out")
    verification = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert all(score["within"] for score in verification["scores"])
    before, now = (
        json.loads((folder / "reproduce" / "reproduce.json").read_text())
        for folder in (EARLIER / "merged", tmp_path / "out")
    )
    assert now["tensors"] == before["tensors"], "the same plan has to give the same bits"


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_bundle_is_rebuilt_bit_for_bit(form: str, tmp_path: Path) -> None:
    printed = ray_abliterate("reproduce", EARLIER / form, "--to", tmp_path / "again")
    assert "bit for bit" in printed


@pytest.mark.ray
def test_a_run_is_resumed_and_repeats_no_trial(run: Path) -> None:
    before = RunDirectory(run).trials()
    ray_abliterate("resume", run, "--trials", "+2")
    after = RunDirectory(run).trials()
    assert len(after) == 8
    assert after[: len(before)] == before
    assert len({trial.plan.to_json() for trial in after}) == 8
