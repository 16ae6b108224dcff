"""The engine's packed passes, compared with transformers' own forward and `generate`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.ablation.virtual_edits import VirtualEdits
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import find_blocks, find_writers, hidden_size
from ray_abliterate.model.engine.batch import Batch
from ray_abliterate.model.engine.engine import Engine, Techniques
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.padded_model import PaddedModel, probe_rows
from ray_abliterate.model.prefix_cache import Prefix
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.testing.tiny import tiny_model

FAMILIES = (
    "llama/biases", "gpt2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3",
    "gpt_oss", "cohere2", "phi3", "olmo2", "gpt_neox", "opt", "gpt_bigcode", "llama4_text",
)  # fmt: skip
"""Grouped heads, one head for all, biases, windows, soft caps, sinks, latent keys, experts, learned
positions. Windows are 8 positions, so the rows below outgrow them."""
LINEAR = ("llama/biases", "gpt2", "gemma3_text", "olmo2", "cohere2", "phi3")
LENGTHS = (12, 17, 13, 21)
LIMIT = 12


class NoText:
    def stream(self) -> "NoText":
        return self

    def push(self, token: int) -> str:
        return ""

    def decode(self, ids: object) -> str:
        return ""


class Case:
    """One tiny model, with the engine and with padded passes."""

    def __init__(self, family: str, device: str = "cpu") -> None:
        self.module = tiny_model(family).eval().to(device)
        self.blocks = list(find_blocks(self.module)[1])
        self.packed = PackedModel(self.module, self.blocks)
        self.ends = [2]
        self.engine = Engine(self.packed, self.ends, NoText(), len(self.blocks))
        self.padded = PaddedModel(self.module, self.blocks, self.ends, 0)
        self.rows = probe_rows(self.module, LENGTHS, 9)
        self.cache = WeightCache(self.module, find_writers(self.module))

    def plain_logits(self) -> torch.Tensor:
        """Each row by itself, through the model's own attention."""
        return torch.stack([self.padded.logits([r], 1, Prefix())[0, 0] for r in self.rows])

    def plain_answers(self) -> list[list[int]]:
        return [self.padded.generate([r], LIMIT, Prefix())[0] for r in self.rows]

    def logits(self, batch: Batch, edits: tuple[int, ...] = (0,)) -> list[torch.Tensor]:
        by_edit = self.engine.logits(batch, [1] * len(self.rows), edits)
        return [torch.cat(rows) for rows in by_edit]

    def answers(self, batch: Batch, edits: tuple[int, ...] = (0,)) -> list[list[list[int]]]:
        observers, indices = [None] * len(edits), range(len(self.rows))
        by_edit = self.engine.answer(batch, LIMIT, observers, indices, edits)
        return [[answer.tokens for answer in answers] for answers in by_edit]

    def learned(self) -> Batch:
        """A batch that the base model has computed."""
        batch = self.engine.batch(self.rows)
        with self.engine.learning():
            self.logits(batch)
            self.answers(batch)
        return batch

    def directions(self, seed: int = 0) -> Directions:
        generator = torch.Generator().manual_seed(seed)
        size = len(self.blocks), hidden_size(self.module)
        vectors = torch.nn.functional.normalize(torch.randn(*size, generator=generator), dim=-1)
        return Directions(vectors, "random", {})

    def plan(self, first: int, norm: str = "none", strength: float = 1.0) -> Plan:
        """Edits the blocks from `first` on."""
        last = len(self.blocks) - 1
        profile = Profile(strength, float(last), 1.0, max(last - first, 0) + 0.5)
        components = sorted({w.component for w in self.cache.writers})
        return Plan("per-layer", 0.0, norm, tuple((c, profile) for c in components))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module", params=LINEAR)
def linear(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of float32 sums, which moves logits of a few units by 1e-5."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packed_rows_have_the_logits_and_answers_of_rows_alone(case: Case) -> None:
    batch = case.engine.batch(case.rows)
    assert batch.prefix == 9
    close(case.logits(batch)[0], case.plain_logits())
    assert case.answers(batch)[0] == case.plain_answers()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_starting_at_the_first_edited_block_and_verifying_drafts_changes_no_token(
    case: Case, first: int
) -> None:
    batch = case.learned()
    assert batch.drafts == case.plain_answers()
    with case.cache.edited(case.plan(first), case.directions()):
        assert case.cache.untouched == first
        case.engine.untouched = first
        try:
            close(case.logits(batch)[0], case.plain_logits())
            assert case.answers(batch)[0] == case.plain_answers()
        finally:
            case.engine.untouched = 0


@pytest.mark.parametrize("off", ["shared_prefix", "layer_reuse", "drafts", "early_exit"])
def test_each_technique_is_only_faster(case: Case, off: str) -> None:
    batch = case.learned()
    with case.cache.edited(case.plan(2), case.directions(1)):
        case.engine.untouched = 2
        expected = case.plain_answers()
        case.engine.techniques = Techniques(**{off: False})
        try:
            assert case.answers(batch)[0] == expected
            assert case.answers(case.engine.batch(case.rows))[0] == expected
        finally:
            case.engine.techniques, case.engine.untouched = Techniques(), 0


def test_reading_tokens_every_few_steps_changes_no_token(case: Case) -> None:
    case.engine.decoder.stride = 5
    try:
        assert case.answers(case.engine.batch(case.rows))[0] == case.plain_answers()
    finally:
        case.engine.decoder.stride = 1


def test_what_the_base_model_computed_is_reused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would hold without any reuse."""
    batch = case.learned()
    passes = []
    real = case.packed.run
    monkeypatch.setattr(
        case.packed, "run", lambda p, *a: passes.append((p.start, len(p.ids))) or real(p, *a)
    )
    case.engine.untouched = 3
    try:
        answers = case.answers(batch)[0]
    finally:
        case.engine.untouched = 0
    drafts = [draft[:-1] for draft in batch.drafts or []]
    unshared = sum(map(len, case.rows)) - 9 * (len(case.rows) - 1)
    fed = sum(map(len, drafts))
    assert answers == batch.drafts
    assert sum(tokens for _, tokens in passes) == unshared + fed
    assert {start for start, _ in passes} == {3}


def test_keys_are_stored_once_for_what_rows_share_and_not_for_padding(case: Case) -> None:
    batch = case.learned()
    unshared = sum(len(row) - 9 for row in case.rows)
    drafted = sum(len(draft) - 1 for draft in batch.drafts or [])
    assert len(batch.keys) == len(case.blocks) - 1
    assert {len(t) for t in [*batch.keys.values(), *batch.values.values()]} == {
        9 + unshared + drafted
    }


def test_the_base_models_answers_are_not_written_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = case.learned()
    monkeypatch.setattr(case.packed, "run", None)
    case.engine.untouched = len(case.blocks)
    try:
        assert case.answers(batch)[0] == batch.drafts
        with pytest.raises(TypeError):
            case.engine.answer(batch, LIMIT + 5, [None], range(len(case.rows)))
    finally:
        case.engine.untouched = 0


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_trials_that_share_passes_give_what_they_give_alone(linear: Case, norm: str) -> None:
    batch, directions = linear.learned(), linear.directions(2)
    plans = [linear.plan(1, norm, 0.7), Plan.nothing(), linear.plan(3, norm), linear.plan(2, norm)]
    alone = []
    for plan in plans:
        with linear.cache.edited(plan, directions):
            alone.append((linear.plain_logits(), linear.plain_answers()))
    virtual = VirtualEdits(linear.packed, linear.cache)
    edits = (0, 1, 2, 3)
    with virtual.applied(plans, directions) as untouched:
        assert untouched == 1
        linear.engine.untouched = untouched
        try:
            logits, answers = linear.logits(batch, edits), linear.answers(batch, edits)
            some = linear.answers(batch, (2, 0))
        finally:
            linear.engine.untouched = 0
    for number, (expected, texts) in enumerate(alone):
        close(logits[number], expected)
        assert answers[number] == texts
    assert some == [alone[2][1], alone[0][1]]
    close(linear.logits(batch)[0], linear.plain_logits())


def test_stacked_experts_have_no_virtual_edits() -> None:
    case = Case("mixtral")
    with pytest.raises(ModelError, match="not the weight of a linear layer"):
        VirtualEdits(case.packed, case.cache)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**20))
def test_any_mix_of_lengths_gives_each_row_its_own_logits(lengths: list[int], seed: int) -> None:
    case = _LLAMA
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]
    by_row = case.engine.logits(case.engine.batch(rows), [1] * len(rows))[0]
    for row, logits in zip(rows, by_row, strict=True):
        close(logits[0], case.padded.logits([row], 1, Prefix())[0, 0])


_LLAMA = Case("llama/biases")
