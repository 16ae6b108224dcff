"""One long text through a model, and through a run's trial."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from rich.console import Console

from ray_abliterate.errors import EvaluationError
from ray_abliterate.long_text import Reading, read_with_model, read_with_run, totals_table
from ray_abliterate.plan import Profile
from ray_abliterate.rundir import RunDirectory


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.npy"
    numpy.save(file, numpy.random.default_rng(0).integers(5, 20, 200).astype(numpy.uint16))
    return str(file)


def test_base_model_and_trial_read_the_same_text_and_differ(
    planted_run: Any, text: str, tmp_path: Path
) -> None:
    reading = Reading(text, carry="kv", chunk_size=64)
    quiet = Console(quiet=True)
    found = read_with_run(planted_run.directory, 0, reading, tmp_path / "found", quiet)
    assert list(found) == ["base", "trial-0"]
    assert {totals.tokens for totals in found.values()} == {199}
    assert found["base"].nats != found["trial-0"].nats
    chunks = [
        json.loads(line)
        for line in (tmp_path / "found" / "trial-0.chunks.jsonl").read_text().splitlines()
    ]
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2, 3]
    assert sum(chunk["nats"] for chunk in chunks) == pytest.approx(found["trial-0"].nats)
    kept = json.loads((tmp_path / "found" / "totals.json").read_text())
    assert kept["totals"]["base"]["perplexity"] == found["base"].perplexity
    assert len(totals_table(found).rows) == 2
    alone = read_with_model(str(planted_run.model), reading, tmp_path / "model", quiet)
    assert alone["model"].nats == found["base"].nats


def test_a_trial_begins_where_its_edit_does_with_states_of_the_base_model(
    planted_run: Any, text: str, tmp_path: Path
) -> None:
    shutil.copytree(planted_run.directory.path, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    first = planted_run.trial
    profiles = tuple((name, Profile(1.0, 3.0, 1.0, 1.0)) for name, _ in first.plan.profiles)
    run.append(replace(first, number=1, plan=replace(first.plan, profiles=profiles)))
    place = tmp_path / "found"

    def read(states: float) -> dict[str, float]:
        reading = Reading(text, carry="kv", chunk_size=64, states=states)
        found = read_with_run(run, 1, reading, place, Console(quiet=True))
        return {name: totals.nats for name, totals in found.items()}

    def kept() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in (place / "states").glob("*/*")}

    wanted = read(0.0)
    assert not (place / "states").exists()
    assert wanted["base"] != wanted["trial-1"]
    assert read(1.0) == wanted
    written = kept()
    assert len(written) == 5  # four chunks, and the mark of the end
    assert read(1.0) == wanted
    assert kept() == written


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"carry": "all"}, "'all' is not one of: kv, window, state, none"),
        ({"text": "nothing.txt"}, r"'nothing.txt' is not a file"),
        ({"chunk_size": 8, "overlap": 8}, "overlap = 8 leaves nothing of chunk_size = 8"),
        ({"carry": "kv", "chunk_size": 1}, "chunk_size = 1: a chunk needs two tokens"),
        ({"carry": "kv", "chunk_size": 8, "overlap": 2}, "Set overlap = 0, or carry = none"),
        ({"carry": "kv", "window": 8}, "Set carry = window, or leave window unset"),
        ({"window": 1}, "window = 1 is too few"),
        ({"max_tokens": 1}, "max_tokens = 1 is too few"),
        ({"states": -1.0}, "states = -1.0 is negative"),
    ],
)
def test_what_can_be_known_is_refused_before_a_model_is_loaded(
    text: str, own: dict[str, Any], says: str
) -> None:
    with pytest.raises(EvaluationError, match=says):
        Reading(**{"text": text, **own})
