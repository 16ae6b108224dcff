"""Evaluations of whole texts: memory that runs out, kills, single chunks, states, wrong input."""

import json
import math

import numpy
import pyarrow
import pytest
import torch

from ray_abliterate.errors import (
    EvaluationChanged,
    EvaluationError,
    TokenSourceError,
    UnsupportedCarry,
)
from ray_abliterate.evaluation.streaming import CarriedContext, StreamingEvaluator
from ray_abliterate.evaluation.streaming.pass_size import tokens_per_pass
from ray_abliterate.evaluation.streaming.runners import ModuleRunner
from tests.evaluation.streaming.conftest import (
    full_losses,
    losses_by_chunk,
    model,
    streamed,
    text_of,
)

EACH_CARRY = [
    ("llama", {"carry": "kv"}),
    ("llama", {"carry": "window", "window": 9}),
    ("gemma2", {"carry": "kv"}),
    ("falcon_h1", {"carry": "kv"}),
    ("mamba2", {"carry": "state"}),
    ("llama", {"carry": "none", "overlap": 10}),
]


def ids_of(cases):
    return [f"{family}-{settings['carry']}" for family, settings in cases]


def untimed(results):
    return [{**r.to_json(), "seconds": 0, "tokens_per_second": 0, "passes": 0} for r in results]


def settled(totals):
    return {**totals.to_json(), "seconds": 0, "tokens_per_second": 0}


@pytest.fixture
def shortage(monkeypatch):
    """Passes of more tokens than this run out of memory, after they have changed the cache."""
    feed = ModuleRunner.feed
    limit = {"tokens": 10**9, "failures": 0}

    def fails(self, ids, targets):
        losses = feed(self, ids, targets)
        if len(ids) > limit["tokens"]:
            limit["failures"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(ModuleRunner, "feed", fails)
    return limit


@pytest.mark.parametrize(("family", "settings"), EACH_CARRY, ids=ids_of(EACH_CARRY))
def test_a_chunk_that_does_not_fit_is_done_again_in_halves_from_its_start(
    family, settings, shortage, text
):
    evaluator = StreamingEvaluator(model(family), chunk_size=60, **settings)
    wanted = list(evaluator.stream(text))
    shortage["tokens"] = 20
    found = list(evaluator.stream(text))
    assert shortage["failures"] == 2  # of 60 and 30 tokens; then 15 are known to fit
    assert max(c.passes for c in found) == 4
    assert [c.loss for c in found] == pytest.approx([c.loss for c in wanted], abs=2e-5)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]


def test_a_token_that_does_not_fit_is_an_error(shortage, text):
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=16)
    shortage["tokens"] = 0
    with pytest.raises(EvaluationError, match=r"one token does not fit into memory\.\n  Lower"):
        evaluator.evaluate(text)


def test_a_chunk_that_cannot_be_cut_is_an_error_that_names_the_setting(shortage, text):
    evaluator = StreamingEvaluator(model("mamba"), carry="none", chunk_size=64)
    shortage["tokens"] = 20
    with pytest.raises(EvaluationError, match=r"can't take it in parts\.\n  Lower chunk_size"):
        evaluator.evaluate(text)


def test_other_errors_of_a_model_are_not_taken_for_a_lack_of_memory(monkeypatch, text):
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=64)

    def fails(self, ids, targets):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(ModuleRunner, "feed", fails)
    with pytest.raises(RuntimeError, match="the model is broken"):
        evaluator.evaluate(text)


def test_passes_are_as_long_as_memory_allows(monkeypatch):
    module, cpu = model("llama"), torch.device("cpu")
    assert tokens_per_pass(module, cpu, 512) == 1024
    sizes = []
    for free in (0, 10**6, 10**7):
        monkeypatch.setattr(
            "ray_abliterate.evaluation.streaming.pass_size.free_bytes", lambda _, f=free: f
        )
        sizes.append(found := tokens_per_pass(module, cpu, 512))
    assert sizes[0] == 16 < sizes[1] < sizes[2] < 1024
    evaluator = StreamingEvaluator(module, carry="kv")
    assert evaluator.choose(None).geometry.chunk_size == found


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize(("family", "settings"), EACH_CARRY, ids=ids_of(EACH_CARRY))
def test_an_evaluation_goes_on_after_a_kill_to_the_same_totals(family, settings, text, tmp_path):
    def run(state, losses, kill_after=None):
        def told(progress):
            if progress.chunk.index == kill_after:
                raise Killed

        evaluator = StreamingEvaluator(model(family), chunk_size=60, **settings)
        return evaluator.stream(
            text,
            state=tmp_path / state,
            token_losses=tmp_path / losses,
            on_progress=told,
            save_seconds=0,
        )

    whole = run("a", "a.arrow")
    wanted = list(whole)
    for kill_after in (0, 3):
        with pytest.raises(Killed):
            list(run("b", "b.arrow", kill_after))
    assert (tmp_path / "b").exists()
    with (tmp_path / "b.arrow").open("ab") as file:
        file.write(b"chunks that were written after the state was saved" * 1000)
    rest = run("b", "b.arrow")
    assert untimed(rest) == untimed(wanted[4:])
    assert settled(rest.totals) == settled(whole.totals)
    assert (tmp_path / "b.arrow").read_bytes() == (tmp_path / "a.arrow").read_bytes()
    assert not (tmp_path / "b").exists()


def test_a_cache_too_large_to_save_is_made_again_from_the_text(monkeypatch, text, tmp_path):
    monkeypatch.setattr("ray_abliterate.evaluation.streaming.stream.MOST_SAVED_BYTES", 10)
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=60)
    wanted = list(evaluator.stream(text))
    begun = evaluator.stream(text, state=tmp_path / "s", save_seconds=0)
    for found, _ in zip(begun, range(2), strict=False):
        assert found.index < 3
    begun.close()
    assert (tmp_path / "s").stat().st_size < 5000
    rest = list(evaluator.stream(text, state=tmp_path / "s"))
    assert untimed(rest) == untimed(wanted[-len(rest) :])
    assert len(rest) < len(wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chunk_size": 50}, "chunk_size: 60 saved, 50 now"),
        ({"carry": "window"}, "carry: 'kv' saved, 'window' now"),
        ({"max_tokens": 250}, "max_tokens: None saved, 250 now"),
    ],
)
def test_a_saved_evaluation_of_something_else_is_refused(change, says, text, tmp_path):
    settings = {"carry": "kv", "chunk_size": 60}
    begun = StreamingEvaluator(model("llama"), **settings).stream(
        text, state=tmp_path / "s", save_seconds=0
    )
    chunks = iter(begun)
    next(chunks), next(chunks)
    changed = StreamingEvaluator(model("llama"), **{**settings, **change})
    with pytest.raises(EvaluationChanged, match=says):
        changed.evaluate(text, state=tmp_path / "s")
    same = StreamingEvaluator(model("llama"), **settings)
    with pytest.raises(EvaluationChanged, match="source"):
        same.evaluate(text_of(300, seed=4), state=tmp_path / "s")
    (tmp_path / "s").write_bytes(b"torn")
    with pytest.raises(EvaluationChanged, match="is no saved evaluation"):
        same.evaluate(text, state=tmp_path / "s")


def test_other_weights_are_another_evaluation(text, tmp_path):
    first = StreamingEvaluator(model("llama"), carry="kv", chunk_size=60)
    chunks = iter(first.stream(text, state=tmp_path / "s", save_seconds=0))
    next(chunks), next(chunks)
    other = StreamingEvaluator(model("llama", seed=1), carry="kv", chunk_size=60)
    with pytest.raises(EvaluationChanged, match="model:"):
        other.evaluate(text, state=tmp_path / "s")


ALONE = [*EACH_CARRY, ("gpt2", {"carry": "window", "window": 9})]


@pytest.mark.parametrize(("family", "settings"), ALONE, ids=ids_of(ALONE))
def test_any_chunk_can_be_computed_alone(family, settings, text):
    evaluator = StreamingEvaluator(model(family), chunk_size=60, **settings)
    chunks = list(evaluator.stream(text))
    for number in (len(chunks) - 1, 0, 2):
        alone = evaluator.chunk(text, number)
        assert (alone.index, alone.start, alone.stop) == (
            number,
            chunks[number].start,
            chunks[number].stop,
        )
        assert alone.loss == pytest.approx(chunks[number].loss, abs=2e-5)
    with pytest.raises(TokenSourceError, match="has no chunk 9"):
        evaluator.chunk(text, 9)


def test_a_chunk_of_a_window_needs_what_its_layers_reach_and_less_is_only_close():
    text = text_of(500)
    evaluator = StreamingEvaluator(model("llama"), carry="window", window=5, chunk_size=40)
    wanted = list(evaluator.stream(text))[10].loss
    layers = model("llama").config.num_hidden_layers
    assert evaluator.chunk(text, 10, warm_up=layers * 4).loss == pytest.approx(wanted, abs=1e-5)
    far = abs(evaluator.chunk(text, 10, warm_up=0).loss - wanted)
    near = abs(evaluator.chunk(text, 10, warm_up=layers * 4 - 4).loss - wanted)
    assert 1e-4 < far and near < far


@pytest.mark.parametrize(("family", "settings"), EACH_CARRY[:2], ids=ids_of(EACH_CARRY[:2]))
def test_token_losses_are_the_losses_of_the_tokens(family, settings, text, tmp_path):
    evaluator = StreamingEvaluator(model(family), chunk_size=60, **settings)
    chunks = evaluator.stream(text, token_losses=tmp_path / "losses.arrow")
    found = list(chunks)
    with pyarrow.memory_map(str(tmp_path / "losses.arrow")) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
    assert table["position"].to_pylist() == list(range(1, 300))
    assert table["token"].to_pylist() == text[1:].tolist()
    losses = torch.from_numpy(table["loss"].to_numpy().copy())
    assert [c.loss for c in found] == pytest.approx(losses_by_chunk(losses, found))
    assert chunks.totals.loss == pytest.approx(float(losses.double().mean()))


def test_totals_are_sums_over_tokens_and_statistics_over_chunks(text):
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=70)
    chunks = evaluator.stream(text)
    found = list(chunks)
    losses = numpy.array([c.loss for c in found])
    assert chunks.totals.chunks == 5 and chunks.totals.tokens == 299
    assert chunks.totals.loss == pytest.approx(float(full_losses(model("llama"), text).mean()))
    assert chunks.totals.perplexity == pytest.approx(math.exp(chunks.totals.loss))
    assert chunks.totals.mean == pytest.approx(losses.mean())
    assert chunks.totals.deviation == pytest.approx(losses.std(ddof=1))
    json.dumps(chunks.totals.to_json(), allow_nan=False)


def test_progress_says_how_far_and_how_long_it_takes(text):
    told = []
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=70, max_tokens=280)
    evaluator.evaluate(text, on_progress=told.append)
    assert [p.position for p in told] == [70, 140, 210, 280]
    assert {p.length for p in told} == {280}
    assert told[0].seconds_left > 0 and told[-1].seconds_left == 0
    assert told[1].totals.chunks == 2
    evaluator.evaluate(iter([text]), on_progress=told.append)
    assert told[-1].seconds_left is None


@pytest.mark.parametrize("limit", [2, 100, 299, 10**6])
def test_no_more_tokens_than_asked_for_are_evaluated(limit, text):
    evaluator = StreamingEvaluator(model("llama"), carry="kv", max_tokens=limit)
    assert evaluator.evaluate(text).tokens == min(limit, 300) - 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "mamba2", "gpt2"])
def test_logits_of_a_whole_chunk_never_exist(family, text, monkeypatch):
    module = model(family)
    evaluator = StreamingEvaluator(module, carry="none", chunk_size=100, overlap=0)
    evaluator._runner.logit_rows = 8
    seen = []
    head = module.get_output_embeddings()
    hook = head.register_forward_hook(lambda _m, _a, logits: seen.append(logits.shape[-2]))
    try:
        found = next(iter(evaluator.stream(text)))
    finally:
        hook.remove()
    assert max(seen) == 8 and sum(seen) == 99
    wanted = float(full_losses(module, text[:100]).double().mean())
    assert found.loss == pytest.approx(wanted, abs=2e-5)


def test_a_head_that_reaches_past_its_body_is_given_short_passes(text):
    evaluator = StreamingEvaluator(model("opt"), carry="kv", chunk_size=100)
    assert "logits exist for whole passes" in evaluator.capabilities.notes[0]
    evaluator._runner.logit_rows = 8
    assert {c.passes for c in evaluator.stream(text)} == {13}


def test_the_model_is_as_it_was(text):
    module = model("gemma2")
    before = dict(module.named_modules())
    streamed(module, text, carry="window", window=6, chunk_size=50)
    assert dict(module.named_modules()) == before
    other = full_losses(module, text)
    assert torch.equal(other, full_losses(module, text))
    exact = streamed(module, text, carry="kv", chunk_size=100)
    assert [c.loss for c in exact] == pytest.approx(losses_by_chunk(other, exact), abs=2e-5)


class Averages:
    """Predicts by the mean of all embeddings so far; its state is their sum."""

    def __init__(self, forgets=False):
        draw = torch.Generator().manual_seed(0)
        self.table = torch.randn(50, 8, generator=draw)
        self.forgets = forgets
        self.reset_state()

    def __call__(self, input_ids):
        sums = self.sum + self.table[input_ids[0]].cumsum(0)
        counts = self.count + torch.arange(1, input_ids.shape[1] + 1)
        self.sum, self.count = sums[-1], int(counts[-1])
        if self.forgets:
            self.reset_state()
        return (sums / counts[:, None] @ self.table.T)[None]

    def get_state(self):
        return {"sum": self.sum, "count": self.count}

    def set_state(self, state):
        self.sum, self.count = state["sum"], state["count"]

    def reset_state(self):
        self.sum, self.count = torch.zeros(8), 0


def test_a_model_that_keeps_its_state_itself_is_carried(tmp_path):
    ids = text_of(200) % 50
    whole = StreamingEvaluator(Averages(), vocab=50, chunk_size=200).evaluate(ids)
    evaluator = StreamingEvaluator(Averages(), vocab=50, chunk_size=30)
    assert evaluator.choose(None).carry is CarriedContext.STATE
    assert evaluator.evaluate(ids).loss == pytest.approx(whole.loss)
    assert evaluator.chunk(ids, 4).loss == pytest.approx(list(evaluator.stream(ids))[4].loss)
    chunks = evaluator.stream(ids, state=tmp_path / "s", save_seconds=0)
    next(iter(chunks)), next(iter(chunks))
    assert evaluator.evaluate(ids, state=tmp_path / "s").loss == pytest.approx(whole.loss)


def test_a_state_that_is_not_kept_is_found_out():
    evaluator = StreamingEvaluator(Averages(forgets=True), vocab=50, chunk_size=30)
    assert evaluator.choose(None).carry is CarriedContext.NONE
    with pytest.raises(UnsupportedCarry, match="carry = state with Averages"):
        StreamingEvaluator(Averages(forgets=True), vocab=50, carry="state")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"carry": "all"}, r"carry = 'all' is not one of: kv, window, state, none"),
        ({"carry": "state"}, r"no recurrent state.*\n  Set carry to one of: kv, window, none"),
        ({"carry": "none", "chunk_size": 8, "overlap": 8}, "overlap = 8 leaves nothing"),
        ({"carry": "kv", "overlap": 8}, "Set overlap = 0, or carry = none"),
        ({"carry": "kv", "window": 8}, "Set carry = window, or leave window unset"),
        ({"carry": "window", "window": 1}, "window = 1 is too few"),
        ({"max_tokens": 1}, "max_tokens = 1 is too few.\n  Set it to 2 or more"),
        ({"carry": "kv", "chunk_size": 0}, "chunk_size = 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_text_is_read(settings, says):
    with pytest.raises(EvaluationError, match=says):
        StreamingEvaluator(model("llama"), **settings)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "is empty.\n  Give a text of two tokens or more"),
        ([5], "has one token, and the first token of a text is not predicted"),
        ([5, 6, 7], r"has 3 tokens, fewer than chunk_size = 50.\n  Set chunk_size = 3 or less"),
        ([5] * 60 + [97], "token 60 is 97, and the model has ids from 0 to 96"),
        ([5] * 60 + [-1], "token 60 is -1"),
        ([0.5, 1.5], "holds float64"),
        ([[1, 2], [3, 4]], r"of shape \(2, 2\); tokens are a one-dimensional"),
    ],
)
def test_texts_that_cannot_be_are_refused(ids, says):
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=50)
    with pytest.raises(EvaluationError, match=says):
        evaluator.evaluate(ids)


def test_chunks_before_a_wrong_id_are_given(text):
    ids = text.clone()
    ids[250] = 97
    chunks = StreamingEvaluator(model("llama"), carry="kv", chunk_size=50).stream(ids)
    with pytest.raises(EvaluationError, match="token 250 is 97"):
        list(chunks)
    with pytest.raises(EvaluationError, match="token 250 is 97"):
        StreamingEvaluator(model("llama"), carry="kv", chunk_size=50).chunk(ids, 5)
    assert chunks.totals.chunks == 5
    assert chunks.totals.tokens == 249


def test_a_short_text_is_one_chunk_if_no_size_was_asked_for():
    for carry in ("kv", "none"):
        assert StreamingEvaluator(model("llama"), carry=carry).evaluate([5, 6, 7]).tokens == 2


def test_what_is_no_model_is_refused():
    with pytest.raises(EvaluationError, match="model is a dict: no causal language model"):
        StreamingEvaluator({})
    with pytest.raises(EvaluationError, match="vocab is not set, and Averages has no config"):
        StreamingEvaluator(Averages())


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_token(text, monkeypatch):
    feed = ModuleRunner.feed
    evaluator = StreamingEvaluator(model("llama"), carry="kv", chunk_size=50)

    def overflows(self, ids, targets):
        losses = feed(self, ids, targets).clone()
        losses[4] = float("nan")
        return losses

    monkeypatch.setattr(ModuleRunner, "feed", overflows)
    with pytest.raises(EvaluationError, match="the loss of token 5 is nan"):
        evaluator.evaluate(text)
