"""Recorded decode steps against steps one by one: the tokens are the same.

On a CPU the recorder is one of tensor operations, which repeats what a GPU's graph would: Python
does not run again, and tensors are read where they lay.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

from ray_abliterate.ablation.virtual_edits import VirtualEdits
from ray_abliterate.model.engine.batch import Row
from ray_abliterate.model.engine.cuda_graphs import (
    ROW_STEP,
    CudaGraphs,
    RecordedSteps,
    Recorder,
    Replay,
)
from ray_abliterate.model.engine.engine import Techniques
from ray_abliterate.model.padded_model import probe_rows
from tests.model.engine.test_engine import FAMILIES, LIMIT, Case
from tests.support.recorder import Recordings

EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"}
"""On some GPUs transformers looks up which of them have tokens, and they can't be recorded."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Counted:
    """A recorder that counts."""

    def __init__(self, record: Recorder) -> None:
        self.made = self.replayed = 0
        self._record = record

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        replay, result = self._record(work)
        self.made += 1

        def again() -> None:
            self.replayed += 1
            replay()

        return again, result


class Recorded(Case):
    """A case whose steps are recorded."""

    def __init__(self, family: str, device: str = "cpu") -> None:
        super().__init__(family, device)
        self.recorder = Counted(
            CudaGraphs(self.packed.device) if device == "cuda" else Recordings()
        )
        self.recorded = RecordedSteps(self.packed, self.recorder)
        self.engine.decoder.recorded = self.recorded
        self.engine.decoder.stride = 3

    def both(
        self, edits: tuple[int, ...] = (0,), rows: Sequence[Row] = (), limit: int = LIMIT
    ) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Answers by recorded steps, and by steps one by one."""
        found = []
        for recorded in (True, False):
            self.engine.techniques = Techniques(recorded_steps=recorded)
            batch = self.engine.batch(rows or self.rows)
            watches, every = [None] * len(edits), range(len(batch.rows))
            written = self.engine.answer(batch, limit, watches, every, edits)
            found.append([[answer.tokens for answer in own] for own in written])
        return found[0], found[1]


@pytest.fixture
def llama() -> Recorded:
    return Recorded("llama/biases")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_replayed_and_no_token_changes(family: str, device: str) -> None:
    case = Recorded(family, device)
    expected = case.plain_answers()
    for _ in range(3):
        recorded, one_by_one = case.both()
        assert recorded[0] == one_by_one[0] == expected
    if device == "cpu" or family not in EXPERTS:
        assert not case.recorded.off
        assert case.recorder.made == 1
        assert case.recorder.replayed >= 3 * (LIMIT - 2) - case.engine.decoder.stride


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_looks_at_values_is_run_step_by_step(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = Recorded("llama/biases", device)

    def look(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        assert output.abs().sum().item() > 0

    case.blocks[1].mlp.register_forward_hook(look)
    with caplog.at_level("INFO", "ray_abliterate"):
        for _ in range(2):
            recorded, one_by_one = case.both()
            assert recorded[0] == one_by_one[0] == case.plain_answers()
    assert case.recorded.off
    assert not case.recorder.made
    assert len([r for r in caplog.records if "not recorded" in r.message]) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_edited_weights_are_seen_by_what_was_recorded_before(device: str) -> None:
    case = Recorded("llama/biases", device)
    base, _ = case.both()
    for first in (0, 2):
        with case.cache.edited(case.plan(first, "row", 1.5), case.directions()):
            recorded, one_by_one = case.both()
        assert recorded == one_by_one
        assert recorded != base
    assert case.both()[0] == base
    assert case.recorder.made == 1


@pytest.mark.parametrize("device", DEVICES)
def test_edits_beside_the_weights_are_recorded_anew(device: str) -> None:
    case = Recorded("llama/biases", device)
    edits, made = VirtualEdits(case.packed, case.cache), []
    for first in (0, 1, 2):
        plans = [case.plan(first, "row", 1.5), case.plan(first, "none", 0.7)]
        with edits.opened(plans, case.directions()):
            recorded, one_by_one = case.both((0, 1))
        assert recorded == one_by_one
        assert recorded[0] != recorded[1]
        made.append(case.recorder.made)
    assert made == [1, 2, 3]
    recorded, one_by_one = case.both()
    assert recorded == one_by_one
    assert recorded[0] == case.plain_answers()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_end_leave_and_what_goes_on_is_replayed(device: str) -> None:
    case = Recorded("llama/biases", device)
    lengths = [9 + i % 7 for i in range(3 * ROW_STEP)]
    rows = probe_rows(case.module, lengths, 4)
    whole = case.both(rows=rows, limit=40)[1][0]
    case.engine.decoder.recorded = case.recorded = RecordedSteps(case.packed, case.recorder)

    class Ends:
        """Each row ends after a number of characters of its own; each token is one."""

        def __init__(self, limits: Sequence[int]) -> None:
            self.limits = limits

        def begin(self, index: int) -> None:
            read[index] = 0

        def read(self, index: int, text: str) -> bool:
            read[index] += len(text)
            return read[index] > self.limits[index]

        def enough(self) -> bool:
            return False

    class Dots:
        def push(self, token: int) -> str:
            return "."

        def stream(self) -> "Dots":
            return self

        def decode(self, ids: Sequence[int]) -> str:
            return "." * len(ids)

    read: dict[int, int] = {}
    case.engine._text = Dots()
    case.engine.techniques = Techniques()
    before = case.recorder.made
    upwards = [i // 2 for i in range(len(rows))]
    for limits in (upwards, upwards[::-1]):
        watches, every = [Ends(limits)], range(len(rows))
        written = case.engine.answer(case.engine.batch(rows), 40, watches, every)[0]
        assert case.recorder.made - before >= 3  # sizes of the slab
        assert len({len(answer.tokens) for answer in written}) > 10
        for answer, text in zip(written, whole, strict=True):
            assert answer.tokens == text[: len(answer.tokens)]


def test_long_answers_take_a_recording_for_each_stretch_of_positions(llama: Recorded) -> None:
    recorded, one_by_one = llama.both(limit=100)
    assert recorded == one_by_one
    assert llama.recorder.made == 2


def test_memory_that_was_given_back_is_taken_again(llama: Recorded) -> None:
    recorded, one_by_one = llama.both()
    llama.engine.decoder.forget()
    assert llama.both() == (recorded, one_by_one)
    assert llama.recorder.made == 2


def test_larger_slabs_move_the_memory_and_what_was_recorded_in_it_is_not_replayed(
    llama: Recorded,
) -> None:
    few = llama.both()
    many = probe_rows(llama.module, [11] * 20, 4)
    recorded, one_by_one = llama.both(rows=many)
    assert recorded == one_by_one
    assert llama.both() == few
    assert llama.recorder.made == 3


def test_a_recording_that_does_something_else_is_not_used(llama: Recorded) -> None:
    def wrong(work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        replay, result = Recordings()(work)
        return replay, result.roll(1, -1)

    llama.engine.decoder.recorded = RecordedSteps(llama.packed, wrong)
    recorded, one_by_one = llama.both()
    assert recorded == one_by_one
    assert llama.engine.decoder.recorded.off == "a recorded step gives other logits"


def test_a_broken_edit_is_no_reason_against_recording(llama: Recorded) -> None:
    with llama.cache.edited(llama.plan(0, "none", float("nan")), llama.directions()):
        recorded, one_by_one = llama.both()
    assert recorded == one_by_one
    assert not llama.recorder.made
    assert not llama.recorded.off
    recorded, one_by_one = llama.both()
    assert recorded == one_by_one
    assert recorded[0] == llama.plain_answers()
    assert llama.recorder.made == 1
