"""One long text through a model, and through a run's trial."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from rich.console import Console

from ray_abliterate.cli.tables import text_table
from ray_abliterate.errors import EvaluationChanged, EvaluationError
from ray_abliterate.evaluation.streaming.reader import TextRequest
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.suite_runner import BASE_MODEL, MeasuredModel
from ray_abliterate.pipeline.text_evaluation import TextEvaluation, TextResults
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.replica.unedited_replica import UneditedReplica
from ray_abliterate.report.text_page import text_page
from ray_abliterate.search.plan import Plan, Profile
from tests.support.finished_runs import InProcessPool

NAMED = {"name": "planted", "weights": "its own"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.npy"
    numpy.save(file, numpy.random.default_rng(0).integers(5, 20, 2000).astype(numpy.uint16))
    return str(file)


class Stopping(InProcessPool):
    """Stops after so many chunks."""

    left = 10**9

    def call(self, method: Any, *args: Any) -> Any:
        found = super().call(method, *args)
        return self._until_stopped(found) if method is ReplicaApi.read else found

    def _until_stopped(self, results: Any) -> Any:
        for result in results:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield result


@pytest.fixture
def pool(planted_run: Any) -> Stopping:
    return Stopping(Replica(planted_run.directory.read_recipe(), str(planted_run.model), {}))


@pytest.fixture
def read(pool: Stopping, planted_run: Any, tmp_path: Path) -> Any:
    """Base model and trial read a text."""
    directory = planted_run.directory
    setup = TrialSetup(directory.directions(), (), directory.tuning())
    subjects = (BASE_MODEL, MeasuredModel.of(planted_run.trial))

    def reads(reading: TextRequest, folder: str = "found") -> TextResults:
        evaluation = TextEvaluation(pool, pool.put(setup), tmp_path / folder, SilentProgress())
        return evaluation.read(reading, subjects, NAMED)

    return reads


@pytest.mark.parametrize("carry", ["kv", "window", "none"])
def test_base_model_and_trial_read_the_same_text_and_differ(
    read: Any, text: str, tmp_path: Path, carry: str, planted_run: Any
) -> None:
    window = 16 if carry == "window" else None
    reading = TextRequest(text, carry=carry, chunk_size=64, window=window)
    found = read(reading)
    assert list(found.totals) == ["base", "trial-0"]
    assert {totals.tokens for totals in found.totals.values()} == {1999}
    assert found.totals["base"].nats != found.totals["trial-0"].nats
    lines = (tmp_path / "found" / "trial-0.chunks.jsonl").read_text().splitlines()
    chunks = [json.loads(line) for line in lines]
    assert sorted(chunk["index"] for chunk in chunks) == list(range(len(chunks)))
    nats = sum(chunk["nats"] for chunk in chunks)
    assert nats == pytest.approx(found.totals["trial-0"].nats)
    kept = json.loads((tmp_path / "found" / "totals.json").read_text())
    assert kept["totals"]["base"]["perplexity"] == found.totals["base"].perplexity
    alone = UneditedReplica(ModelSettings(name="m"), str(planted_run.model))
    bare = Bare(alone)
    subjects = (MeasuredModel("model", Plan.nothing()),)
    evaluation = TextEvaluation(bare, None, tmp_path / "model", SilentProgress())
    plain = evaluation.read(reading, subjects, NAMED)
    assert plain.totals["model"].nats == found.totals["base"].nats


class Bare(InProcessPool):
    """The same for a model of no run."""


def test_pieces_are_the_texts_own_and_meet_without_a_gap(
    pool: Stopping, text: str, tmp_path: Path
) -> None:
    none = pool.call(
        ReplicaApi.plan_reading, TextRequest(text, carry="none", chunk_size=16, overlap=4), True
    )
    assert none.chunks == 167 and none.pieces()[:2] == ((0, 16), (16, 16))
    assert sum(count for _, count in none.pieces()) == none.chunks
    window = pool.call(
        ReplicaApi.plan_reading, TextRequest(text, carry="window", window=9, chunk_size=8), True
    )
    layers = pool.replica.model.module.config.num_hidden_layers
    assert window.stretch == max(16, layers * 8)
    assert pool.call(ReplicaApi.plan_reading, TextRequest(text, carry="kv"), True).pieces() == (
        (0, None),
    )
    words = tmp_path / "words.txt"
    words.write_text("tell me about the rain " * 40)
    counted = pool.call(
        ReplicaApi.plan_reading, TextRequest(str(words), carry="none", chunk_size=32), True
    )
    assert counted.tokens is not None and counted.tokens >= 200
    assert (
        pool.call(ReplicaApi.plan_reading, TextRequest(str(words), carry="none"), False).stretch
        is None
    )


@pytest.mark.parametrize("carry", ["kv", "window", "none"])
def test_a_text_that_was_stopped_goes_on_to_the_same_totals(
    pool: Stopping, read: Any, text: str, tmp_path: Path, carry: str
) -> None:
    window = 16 if carry == "window" else None
    reading = TextRequest(text, carry=carry, chunk_size=64, window=window)
    whole = read(reading, "whole")
    pool.left = 21
    with pytest.raises(KeyboardInterrupt):
        read(reading)
    with (tmp_path / "found" / "base.chunks.jsonl").open("a") as file:
        file.write('{"index": 21, "na')  # cut off as its writer was killed
    pool.left = 10**9
    found = read(reading)
    for name, totals in found.totals.items():
        assert (totals.nats, totals.chunks) == (
            pytest.approx(whole.totals[name].nats, rel=1e-6),
            whole.totals[name].chunks,
        )
    pool.left = 0
    assert read(reading).totals == found.totals  # nothing is read again


def test_a_folder_of_another_reading_is_refused(read: Any, text: str, tmp_path: Path) -> None:
    read(TextRequest(text, carry="none", chunk_size=64))
    with pytest.raises(EvaluationChanged, match="asked changed"):
        read(TextRequest(text, carry="none", chunk_size=32))
    numpy.save(text, numpy.zeros(2000, numpy.uint16))
    with pytest.raises(EvaluationChanged, match="text changed"):
        read(TextRequest(text, carry="none", chunk_size=64))


def test_models_are_compared_chunk_by_chunk(read: Any, text: str) -> None:
    found = read(TextRequest(text, carry="none", chunk_size=64))
    apart = found.difference("base", "trial-0")
    each = [b.loss - a.loss for a, b in zip(*found.chunks.values(), strict=True)]
    assert apart is not None and apart.items == len(each)
    assert apart.difference == pytest.approx(sum(each) / len(each))
    assert apart.low <= apart.difference <= apart.high
    output = Console(width=160, record=True)
    output.print(text_table(found))
    assert "second line: mean difference from base" in output.export_text()
    page = text_page(found)
    assert "trial-0" in page and "nats per token" in page
    assert 'src="http' not in page and "cdn.plot.ly" not in page.split("<body>")[1][:2000]


def test_a_trial_begins_where_its_edit_does_with_states_of_the_base_model(
    pool: Stopping, planted_run: Any, text: str, tmp_path: Path
) -> None:
    directory, first = planted_run.directory, planted_run.trial
    profiles = tuple((name, Profile(1.0, 3.0, 1.0, 1.0)) for name, _ in first.plan.profiles)
    later = MeasuredModel("trial-1", replace(first.plan, profiles=profiles))
    setup = TrialSetup(directory.directions(), (), directory.tuning())
    assert pool.call(ReplicaApi.first_edited_block, later.plan, setup) > 0

    def read(states: float, folder: str) -> dict[str, float]:
        reading = TextRequest(text, carry="kv", chunk_size=500, states=states)
        place = tmp_path / folder
        subjects = (BASE_MODEL, later)
        evaluation = TextEvaluation(pool, pool.put(setup), place, SilentProgress())
        found = evaluation.read(reading, subjects, NAMED)
        return {name: totals.nats for name, totals in found.totals.items()}

    wanted = read(0.0, "without")
    assert not (tmp_path / "without" / "states").exists()
    assert wanted["base"] != wanted["trial-1"]
    assert read(1.0, "with") == wanted
    states = tmp_path / "with" / "states"
    assert len(list(states.glob("*/*"))) == 5  # four chunks, and the mark of the end
    used = {file: file.stat().st_mtime_ns for file in states.glob("*")}
    for file in (tmp_path / "with").glob("trial-1.*"):
        file.unlink()
    assert read(1.0, "with") == wanted
    assert all(file.stat().st_mtime_ns > before for file, before in used.items())


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
        TextRequest(**{"text": text, **own})


def test_a_text_shorter_than_its_chunk_is_refused(
    pool: Stopping, read: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"2000 tokens, fewer than chunk_size = 4000"):
        pool.call(ReplicaApi.plan_reading, TextRequest(text, carry="none", chunk_size=4000), True)
    few = str(tmp_path / "few.npy")
    numpy.save(few, numpy.arange(5, 95, dtype=numpy.uint16) % 15 + 5)
    found = read(TextRequest(few, carry="none"), "few")
    assert found.totals["base"].chunks == 1 and found.totals["base"].tokens == 89
