"""Decode steps as CUDA graphs against steps kernel by kernel: the tokens are the same.

On a CPU the recorder is one of tensor operations (`tests/support/recorder.py`), which repeats what
a GPU's graph would: Python does not run again, and tensors are read at their old address.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ray_abliterate.ablation.virtual_edits import VirtualEdits
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.model.architecture import find_writers, hidden_size
from ray_abliterate.model.engine.batch import BatchRow
from ray_abliterate.model.engine.cuda_graphs import (
    ROW_STEP,
    CudaGraphRecorder,
    CudaGraphs,
    GraphRecorder,
    Replay,
)
from ray_abliterate.model.engine.engine import Techniques
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.padded_model import probe_rows
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.search.plan import ModelShape, Plan
from tests.model.engine.test_engine import FAMILIES, LIMIT, Case
from tests.support.recorder import OperationRecorder

EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"}
"""On some GPUs transformers looks up which of them have tokens, and they can't be recorded."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class CountingRecorder:
    """A recorder that counts the graphs it made and their replays."""

    def __init__(self, record: GraphRecorder) -> None:
        self.made = self.replayed = 0
        self._record = record

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        replay, result = self._record(work)
        self.made += 1

        def again() -> None:
            self.replayed += 1
            replay()

        return again, result


class GraphCase(Case):
    """A case whose decode steps are recorded."""

    def __init__(self, family: str, device: str = "cpu") -> None:
        super().__init__(family, device)
        self.recorder = CountingRecorder(
            CudaGraphRecorder(self.packed.device) if device == "cuda" else OperationRecorder()
        )
        self.graphs = CudaGraphs(self.packed, self.recorder)
        self.engine.decoder.graphs = self.graphs
        self.engine.decoder.stride = 3
        self.cache.on_hook_change = self.graphs.invalidate

    def answer_both_ways(
        self, edits: tuple[int, ...] = (0,), rows: Sequence[BatchRow] = (), limit: int = LIMIT
    ) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Answers by replayed steps, and by steps kernel by kernel."""
        answers = []
        for replay in (True, False):
            self.engine.techniques = Techniques(recorded_steps=replay)
            batch = self.engine.batch(rows or self.rows)
            observers, indices = [None] * len(edits), range(len(batch.rows))
            by_edit = self.engine.answer(batch, limit, observers, indices, edits)
            answers.append([[answer.tokens for answer in of_edit] for of_edit in by_edit])
        return answers[0], answers[1]


@pytest.fixture
def llama() -> GraphCase:
    return GraphCase("llama/biases")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_replayed_and_no_token_changes(family: str, device: str) -> None:
    case = GraphCase(family, device)
    expected = case.plain_answers()
    for _ in range(3):
        replayed, stepwise = case.answer_both_ways()
        assert replayed[0] == stepwise[0] == expected
    if device == "cpu" or family not in EXPERTS:
        assert not case.graphs.disabled_because
        assert case.recorder.made == 1
        assert case.recorder.replayed >= 3 * (LIMIT - 2) - case.engine.decoder.stride


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_looks_at_values_is_run_step_by_step(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = GraphCase("llama/biases", device)

    def look(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        assert output.abs().sum().item() > 0

    case.blocks[1].mlp.register_forward_hook(look)
    with caplog.at_level("INFO", "ray_abliterate"):
        for _ in range(2):
            replayed, stepwise = case.answer_both_ways()
            assert replayed[0] == stepwise[0] == case.plain_answers()
    assert case.graphs.disabled_because
    assert not case.recorder.made
    assert len([r for r in caplog.records if "not recorded" in r.message]) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_that_was_recorded_before_sees_edited_weights(device: str) -> None:
    case = GraphCase("llama/biases", device)
    base, _ = case.answer_both_ways()
    for first in (0, 2):
        with case.cache.edited(case.plan(first, "row", 1.5), case.directions()):
            replayed, stepwise = case.answer_both_ways()
        assert replayed == stepwise
        assert replayed != base
    assert case.answer_both_ways()[0] == base
    assert case.recorder.made == 1


@pytest.mark.parametrize("device", DEVICES)
def test_no_graph_is_replayed_after_a_hook_of_its_model_changed(device: str) -> None:
    case = GraphCase("llama/biases", device)
    edits, made = VirtualEdits(case.packed, case.cache), []
    for first in (0, 1, 2):
        plans = [case.plan(first, "row", 1.5), case.plan(first, "none", 0.7)]
        with edits.applied(plans, case.directions()):
            replayed, stepwise = case.answer_both_ways((0, 1))
        assert replayed == stepwise
        assert replayed[0] != replayed[1]
        made.append(case.recorder.made)
    assert made == [1, 2, 3]
    replayed, stepwise = case.answer_both_ways()
    assert replayed == stepwise
    assert replayed[0] == case.plain_answers()


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_of_another_model_in_the_process_leave_its_graphs_valid(device: str) -> None:
    case, other = GraphCase("llama/biases", device), GraphCase("llama/biases", device)
    edits = VirtualEdits(other.packed, other.cache)
    replayed, _ = case.answer_both_ways()
    assert case.recorder.made == 1
    plans = [other.plan(0, "row", 1.5)]
    with edits.applied(plans, other.directions()):
        other.answer_both_ways()
        before = case.recorder.replayed
        assert case.answer_both_ways()[0] == replayed
    assert case.recorder.made == 1
    assert case.recorder.replayed > before


def test_a_weight_cache_reports_hook_changes_to_the_model_it_is_attached_to(
    planted: Path, neutral: PromptSet
) -> None:
    model = LanguageModel.load(str(planted), ModelSettings(name="planted"))
    writers = find_writers(model.module)
    cache, recorder = WeightCache(model.module, writers), CountingRecorder(OperationRecorder())
    cache.attach(model)
    assert model._engine is not None
    model._engine.decoder.graphs = CudaGraphs(model.packed, recorder)
    edits, layers = VirtualEdits(model.packed, cache), len(model.blocks)
    shape = ModelShape(layers, hidden_size(model.module), ("attn", "mlp"))
    vectors = torch.nn.functional.normalize(torch.ones(layers, shape.hidden), dim=-1)
    answers = []
    for plan in (Plan.uniform(shape, 1.0, "none", 0.0), Plan.uniform(shape, 1.0, "row", 1.0)):
        with edits.applied([plan], Directions(vectors, "ones", {})):
            for _ in range(2):  # the second time, a step of this shape is recorded
                answers.append(model.continue_greedily(neutral.prompts, 6))
    assert answers[0] == answers[1] and answers[2] == answers[3]
    assert recorder.made == 2


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_end_leave_and_the_others_go_on_by_replays(device: str) -> None:
    case = GraphCase("llama/biases", device)
    lengths = [9 + i % 7 for i in range(3 * ROW_STEP)]
    rows = probe_rows(case.module, lengths, 4)
    whole = case.answer_both_ways(rows=rows, limit=40)[1][0]
    case.engine.decoder.graphs = case.graphs = CudaGraphs(case.packed, case.recorder)

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
        observers, indices = [Ends(limits)], range(len(rows))
        written = case.engine.answer(case.engine.batch(rows), 40, observers, indices)[0]
        assert case.recorder.made - before >= 3  # sizes of the KV cache
        assert len({len(answer.tokens) for answer in written}) > 10
        for answer, text in zip(written, whole, strict=True):
            assert answer.tokens == text[: len(answer.tokens)]


def test_long_answers_take_a_graph_for_each_stretch_of_positions(llama: GraphCase) -> None:
    replayed, stepwise = llama.answer_both_ways(limit=100)
    assert replayed == stepwise
    assert llama.recorder.made == 2


def test_released_memory_is_allocated_again(llama: GraphCase) -> None:
    replayed, stepwise = llama.answer_both_ways()
    llama.engine.decoder.release_memory()
    assert llama.answer_both_ways() == (replayed, stepwise)
    assert llama.recorder.made == 2


def test_a_larger_kv_cache_moves_the_memory_and_no_graph_of_it_is_replayed(
    llama: GraphCase,
) -> None:
    few = llama.answer_both_ways()
    many = probe_rows(llama.module, [11] * 20, 4)
    replayed, stepwise = llama.answer_both_ways(rows=many)
    assert replayed == stepwise
    assert llama.answer_both_ways() == few
    assert llama.recorder.made == 3


def test_a_graph_with_other_logits_is_not_used(llama: GraphCase) -> None:
    def wrong(work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        replay, result = OperationRecorder()(work)
        return replay, result.roll(1, -1)

    llama.engine.decoder.graphs = CudaGraphs(llama.packed, wrong)
    replayed, stepwise = llama.answer_both_ways()
    assert replayed == stepwise
    assert llama.engine.decoder.graphs.disabled_because == "a recorded step gives other logits"


def test_a_broken_edit_is_no_reason_against_recording(llama: GraphCase) -> None:
    with llama.cache.edited(llama.plan(0, "none", float("nan")), llama.directions()):
        replayed, stepwise = llama.answer_both_ways()
    assert replayed == stepwise
    assert not llama.recorder.made
    assert not llama.graphs.disabled_because
    replayed, stepwise = llama.answer_both_ways()
    assert replayed == stepwise
    assert replayed[0] == llama.plain_answers()
    assert llama.recorder.made == 1
