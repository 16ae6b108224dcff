"""States in the middle of a model: the same to the last bit, only where the model is the same."""

import copy
from pathlib import Path

import pytest
import torch

from ray_abliterate.evaluation.streaming import HiddenStateCache, StreamingEvaluator
from ray_abliterate.evaluation.streaming.hidden_state_cache import layer_keys
from ray_abliterate.evaluation.streaming.runners import ModuleRunner
from tests.evaluation.streaming.conftest import model, text_of

CASES = [
    ("llama", {"carry": "kv"}),
    ("llama", {"carry": "window", "window": 9}),
    ("llama", {"carry": "none", "overlap": 10}),
    ("gemma2", {"carry": "kv"}),
    ("gemma3_text", {"carry": "window", "window": 20}),
    ("gpt2", {"carry": "kv"}),
    ("gpt_oss", {"carry": "kv"}),
    ("mamba2", {"carry": "state"}),
    ("mamba2", {"carry": "none"}),
    ("falcon_h1", {"carry": "kv"}),
    ("falcon_h1", {"carry": "window", "window": 9}),
    ("bamba", {"carry": "kv"}),
]
KV = {"carry": "kv"}


class Reader:
    """A model of its own, whose edits and evaluations are followed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family: str, folder: Path, **own) -> None:
        self.module = copy.deepcopy(model(family))
        self.folder, self.own = folder, own
        self.blocks = ModuleRunner(self.module).blocks
        self.ran: set[int] = set()
        numbers = {id(block): number for number, block in enumerate(self.blocks)}
        for kind in {type(block) for block in self.blocks}:

            def counted(block, *args, _forward=kind.forward, **options):
                self.ran.add(numbers.get(id(block), -1))
                return _forward(block, *args, **options)

            monkeypatch.setattr(kind, "forward", counted)

    def edit(self, block: int) -> None:
        """A block's last matrix is another."""
        matrices = [p for p in self.blocks[block].parameters() if p.ndim > 1]
        with torch.no_grad():
            matrices[-1] += 0.05

    def read(self, ids, kept: bool = True, at=(2,), max_bytes: int = 1 << 30, **options):
        """Chunks; `ran` has the blocks that were run for them."""
        files = HiddenStateCache(self.folder, max_bytes) if kept else None
        evaluator = StreamingEvaluator(
            self.module, chunk_size=60, states=files, states_at=at, **self.own
        )
        stream = evaluator.stream(ids, **options)
        self.ran.clear()
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if chunk.index == 1:  # the check of the first chunk is behind
                self.ran.clear()
        return [c.nats for c in chunks]


@pytest.fixture
def reader(monkeypatch, tmp_path):
    def made(family: str, **own) -> Reader:
        return Reader(monkeypatch, family, tmp_path / "states", **own)

    return made


@pytest.mark.parametrize(("family", "own"), CASES, ids=[f"{f}-{o['carry']}" for f, o in CASES])
def test_an_edit_above_is_read_from_there_on_to_the_same_bits(family, own, reader, text):
    one = reader(family, **own)
    base = one.read(text)
    assert one.ran == {0, 1, 2, 3}
    assert base == one.read(text, kept=False)
    for block in (3, 2):
        one.edit(block)
        wanted = one.read(text, kept=False)
        assert wanted != base
        assert one.read(text) == wanted
        assert one.ran == {2, 3}


def test_the_deepest_block_below_the_edit_is_begun_at(reader, text):
    one = reader("llama", **KV)
    one.read(text, at=(1, 3))
    one.edit(3)
    assert one.read(text) == one.read(text, kept=False)
    one.read(text)
    assert one.ran == {3}
    one.edit(2)
    found = one.read(text)
    assert one.ran == {1, 2, 3}
    assert found == one.read(text, kept=False)


@pytest.mark.parametrize("own", [KV, {"carry": "none", "overlap": 10}], ids=["kv", "none"])
def test_an_edit_below_reads_all_again(own, reader, text):
    one = reader("llama", **own)
    before = one.read(text)
    one.edit(1)
    found = one.read(text)
    assert one.ran == {0, 1, 2, 3}
    assert found == one.read(text, kept=False) != before


@pytest.mark.parametrize(
    "change", [{"carry": "window", "window": 9}, {"carry": "kv", "max_tokens": 250}]
)
def test_other_cuts_have_states_of_their_own(change, reader, text):
    one = reader("llama", **KV)
    one.read(text)
    one.own = change
    found = one.read(text)
    assert found == one.read(text, kept=False)


@pytest.mark.parametrize("own", [KV, {"carry": "none", "overlap": 10}], ids=["kv", "none"])
def test_a_text_that_goes_on_otherwise_is_read_again_from_where_it_does(own, reader, text):
    one = reader("llama", **own)
    one.read(text)
    other = text.clone()
    other[200] = (other[200] + 1) % 97
    found = one.read(other)
    wanted = one.read(other, kept=False)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found[:3] == wanted[:3]


def test_a_broken_file_costs_time_and_nothing_else(reader, text):
    one = reader("llama", **KV)
    wanted = one.read(text)
    for file in sorted(one.folder.glob("*/*.safetensors"))[1:3]:
        file.write_bytes(b"torn")
    assert one.read(text) == pytest.approx(wanted, rel=1e-6)


def test_states_of_a_text_that_was_stopped_are_not_used_and_made_anew(reader, text):
    one = reader("llama", **KV)
    wanted = one.read(text, kept=False)
    files = HiddenStateCache(one.folder)
    evaluator = StreamingEvaluator(one.module, chunk_size=60, states=files, states_at=(2,), **KV)
    stream = evaluator.stream(text)
    next(iter(stream))
    stream.close()
    assert one.read(text) == wanted
    assert one.ran == {0, 1, 2, 3}
    assert one.read(text) == wanted
    assert one.ran == {2, 3}


def test_an_evaluation_with_states_goes_on_after_a_kill(reader, text, tmp_path):
    class Killed(BaseException):
        pass

    def told(progress):
        if progress.chunk.index == 2:
            raise Killed

    one = reader("llama", **KV)
    wanted = one.read(text)
    state = {"state": tmp_path / "s", "save_seconds": 0}
    with pytest.raises(Killed):
        one.read(text, on_progress=told, **state)
    rest = one.read(text, **state)
    assert len(rest) == 2
    assert rest == pytest.approx(wanted[3:], rel=1e-6)


def test_the_folder_has_a_limit_and_the_oldest_texts_go_first(reader):
    one = reader("llama", **KV)
    texts = [text_of(300, seed) for seed in (1, 2, 3)]
    wanted = [one.read(ids, kept=False) for ids in texts]
    each = 310 * 32 * 4 * 2  # two blocks, float32, hidden 32; files have heads
    limit = int(2.2 * each)
    for ids, nats in zip(texts, wanted, strict=True):
        assert one.read(ids, at=(1, 2), max_bytes=limit) == nats
        assert HiddenStateCache(one.folder).bytes <= limit
    one.read(texts[2], max_bytes=limit)
    assert one.ran == {2, 3}
    one.read(texts[0], max_bytes=limit)
    assert one.ran == {0, 1, 2, 3}


def test_a_text_that_does_not_fit_is_not_kept(reader, text):
    one = reader("llama", **KV)
    wanted = one.read(text, kept=False)
    assert one.read(text, max_bytes=20_000) == wanted
    assert HiddenStateCache(one.folder).bytes == 0


def test_a_disk_that_is_full_costs_time_and_nothing_else(reader, text, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    one = reader("llama", **KV)
    wanted = one.read(text, kept=False)
    monkeypatch.setattr(
        "ray_abliterate.evaluation.streaming.hidden_state_cache.write_atomically", full
    )
    assert one.read(text) == wanted
    assert HiddenStateCache(one.folder).bytes == 0


def test_passes_that_were_halved_are_not_kept(reader, text, monkeypatch):
    one = reader("llama", **KV)
    feed, limit = ModuleRunner.feed, {"tokens": 10**9}

    def fails(self, ids, targets):
        losses = feed(self, ids, targets)
        if len(ids) > limit["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(ModuleRunner, "feed", fails)
    wanted = one.read(text, kept=False)
    limit["tokens"] = 40
    assert one.read(text) == pytest.approx(wanted, rel=1e-6)
    assert HiddenStateCache(one.folder).bytes == 0
    limit["tokens"] = 10**9
    assert one.read(text) == wanted
    assert one.ran == {0, 1, 2, 3}
    limit["tokens"] = 40
    assert one.read(text) == pytest.approx(wanted, rel=1e-6)


def test_states_are_not_kept_of_what_cannot_be_read_again_or_is_hooked(reader, text):
    one = reader("llama", **KV)
    wanted = one.read(text, kept=False)
    assert one.read(iter([text])) == wanted
    handle = one.blocks[0].register_forward_hook(lambda _m, _a, out: out * 1.01)
    assert one.read(text) != wanted
    handle.remove()
    assert not one.folder.exists()


def test_a_model_whose_blocks_need_those_below_is_not_begun_in_the_middle(reader, text):
    one = reader("llama", **KV)
    forward = type(one.blocks[3]).forward
    seen = {}

    def needs(block, hidden_states, *args, **options):
        found = forward(block, hidden_states, *args, **options)
        if block is one.blocks[0]:
            seen["first"] = found
        return found + seen["first"] if block is one.blocks[3] else found

    kind = type(one.blocks[3])
    kind.forward, before = needs, kind.forward
    try:
        base = one.read(text)
        assert not one.folder.exists()
        assert one.read(text) == base
    finally:
        kind.forward = before


def test_a_key_tells_every_bit_below_its_block():
    module = copy.deepcopy(model("llama"))
    blocks = ModuleRunner(module).blocks
    keys = layer_keys(module, blocks)
    assert len(set(keys)) == 4
    for name, changed in (("model.embed_tokens.weight", 0), ("lm_head.weight", 0)):
        values = module.get_parameter(name)
        kept = values.detach().clone()
        with torch.no_grad():
            values.view(-1)[-1] += 1e-3
        assert not set(layer_keys(module, blocks)) & set(keys[changed:])
        with torch.no_grad():
            values.copy_(kept)
    assert layer_keys(module, blocks) == keys
    with torch.no_grad():
        blocks[1].mlp.down_proj.weight[-1, -1] += 1e-3
    assert [one == two for one, two in zip(layer_keys(module, blocks), keys, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
