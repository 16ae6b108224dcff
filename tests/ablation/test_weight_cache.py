"""The weight cache: edits are the plan's, and undone bit for bit, whatever happens."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ray_abliterate.ablation.planned_edits import PlannedEdits
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import find_writers, oriented
from ray_abliterate.search.plan import ModelShape, Plan, Profile
from ray_abliterate.testing.tiny import tiny_model

FAMILIES = ("llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "mamba2", "qwen3_next")


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unit_directions(layers: int, hidden: int = 32, seed: int = 0) -> Directions:
    random = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(layers, hidden, generator=random), dim=-1)
    return Directions(rows, "random", {})


def a_plan(writers: tuple, norm: str = "none", scope: str = "global", peak: float = 1.0) -> Plan:
    components = sorted({writer.component for writer in writers})
    profile = Profile(peak, 1.2, 0.5, 10.0)
    return Plan(scope, 1.4, norm, tuple((c, profile) for c in components))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_every_writer_changes_inside_and_every_bit_is_back_after(family: str, norm: str) -> None:
    model = tiny_model(family)
    writers = find_writers(model)
    layers = max(writer.layer for writer in writers) + 1
    cache = WeightCache(model, writers)
    before, names = bits(model), {writer.parameter for writer in writers}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with cache.edited(a_plan(writers, norm), unit_directions(layers)):
        inside = bits(model)
        assert cache.differs()
    for name, old in before.items():
        changed = not torch.equal(inside[name], old)
        biases = {writer.bias for writer in writers}
        assert changed == (name in names) or name in biases, name
        assert torch.equal(model.get_parameter(name), old), name
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_weights_are_restored_bit_for_bit_when_a_scorer_raises() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    with (
        pytest.raises(RuntimeError, match="a scorer"),
        cache.edited(a_plan(writers), unit_directions(4)),
    ):
        raise RuntimeError("a scorer")
    assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())
    with cache.edited(a_plan(writers), unit_directions(4)):
        pass


def test_an_edit_that_fails_half_way_leaves_no_layer_edited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    real, calls = PlannedEdits.make_edit, []

    def failing(self: PlannedEdits, *args: object) -> object:
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError("no memory in the middle")
        return real(self, *args)

    monkeypatch.setattr(PlannedEdits, "make_edit", failing)
    with pytest.raises(MemoryError), cache.edited(a_plan(writers), unit_directions(4)):
        pytest.fail("the body must not run")
    assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())


def test_strength_zero_changes_no_bit() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    with cache.edited(a_plan(writers, "row", peak=0.0), unit_directions(4)):
        assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())
        assert not cache.differs()


def test_fifty_random_plans_leave_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_moe").bfloat16()
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    random = torch.Generator().manual_seed(1)
    for number in range(50):
        peak = float(torch.rand((), generator=random)) * 1.5
        norm = ("none", "row", "column")[number % 3]
        scope = ("global", "per-layer")[number % 2]
        with cache.edited(a_plan(writers, norm, scope, peak), unit_directions(4, seed=number % 5)):
            pass
    assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())


def test_a_plan_gives_the_same_bits_whatever_came_before_it() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache = WeightCache(model, writers)
    plan, other = a_plan(writers, "row"), a_plan(writers, "column", "per-layer", 1.3)
    with cache.edited(plan, unit_directions(4)):
        alone = bits(model)
    for seed in (3, 4):
        with cache.edited(other, unit_directions(4, seed=seed)):
            pass
    with cache.edited(plan, unit_directions(4)):
        again = bits(model)
    assert all(torch.equal(again[name], old) for name, old in alone.items())


def test_writers_beyond_the_projection_budget_get_the_same_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    writers = find_writers(model)
    plan, directions = a_plan(writers, "row"), unit_directions(4)
    with WeightCache(model, writers).edited(plan, directions):
        kept = bits(model)
    monkeypatch.setattr("ray_abliterate.ablation.planned_edits.PROJECTION_BUDGET_BYTES", 0)
    with WeightCache(model, writers).edited(plan, directions):
        anew = bits(model)
    for name, old in kept.items():
        torch.testing.assert_close(anew[name], old, rtol=0, atol=1e-6)


def test_only_the_layers_that_a_profile_reaches_are_touched() -> None:
    """Layer 1 is not layers 10 and 11."""
    model = tiny_model("llama", layers=12)
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    plan = Plan("per-layer", 0.0, "none", (("attn", Profile(1.0, 1.0, 1.0, 0.5)),))
    with cache.edited(plan, unit_directions(12)):
        changed = {n for n, old in before.items() if not torch.equal(model.get_parameter(n), old)}
    assert changed == {"model.layers.1.self_attn.o_proj.weight"}


def test_one_layer_can_be_restored_alone() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache, before = WeightCache(model, writers), bits(model)
    name = "model.layers.{}.mlp.down_proj.weight"
    with cache.edited(a_plan(writers), unit_directions(4)):
        cache.restore(layer=2)
        assert torch.equal(model.get_parameter(name.format(2)), before[name.format(2)])
        assert not torch.equal(model.get_parameter(name.format(1)), before[name.format(1)])


def test_edits_do_not_nest() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    cache = WeightCache(model, writers)
    with (
        cache.edited(a_plan(writers), unit_directions(4)),
        pytest.raises(ModelError, match="don't nest"),
        cache.edited(a_plan(writers), unit_directions(4)),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["row", "column"])
def test_an_edit_can_be_suspended_and_is_bit_for_bit_back(family: str, norm: str) -> None:
    model = tiny_model(family)
    writers = find_writers(model)
    layers = max(writer.layer for writer in writers) + 1
    cache, before = WeightCache(model, writers), bits(model)
    plan, directions = a_plan(writers, norm), unit_directions(layers)

    def same(others: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(model.get_parameter(name), old) for name, old in others.items())

    with cache.suspended():
        assert same(before)
    with cache.edited(plan, directions):
        inside = bits(model)
        with cache.suspended(), cache.suspended():
            assert same(before)
            assert not cache.differs()
        assert same(inside)
        with pytest.raises(ModelError, match="applied already"), cache.edited(plan, directions):
            pass
        assert same(inside)
        with pytest.raises(ZeroDivisionError), cache.suspended():
            1 / 0  # noqa: B018
        assert same(inside)
        assert cache.differs()
    assert same(before)


def test_directions_of_another_model_are_refused() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    with (
        pytest.raises(ModelError, match="3 layers"),
        WeightCache(model, writers).edited(a_plan(writers), unit_directions(3)),
    ):
        pass


def test_the_cache_holds_writers_only() -> None:
    model = tiny_model("llama")
    writers = find_writers(model)
    expected = sum(
        4 * model.get_parameter(name).numel()
        for writer in writers
        for name in (writer.parameter, writer.bias)
        if name
    )
    assert WeightCache(model, writers).bytes == expected


def test_post_norm_families_lose_the_direction_that_the_stream_sees() -> None:
    model = tiny_model("gemma2")
    writers = find_writers(model)
    cache, directions = WeightCache(model, writers), unit_directions(4)
    shape = ModelShape(4, 32, tuple(sorted({w.component for w in writers})))
    seen: list[torch.Tensor] = []
    with cache.edited(Plan.uniform(shape, 2.0, "none"), directions):
        writer = writers[0]
        norm = model.get_submodule(writer.post_norm or "")
        weight = oriented(model.get_parameter(writer.parameter), writer)[0]
        seen.append(norm(weight.detach() @ torch.randn(weight.shape[1], 64)[:, :1].squeeze(-1)))
    along = float(seen[0].detach() @ directions.at(2.0)) / float(seen[0].detach().norm())
    assert abs(along) < 1e-5


class Shelf:
    """Read-only arrays under a key, as a node's object store has them."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}

    def share(self, key: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        if key not in self.held:
            self.held[key] = {name: array.copy() for name, array in make().items()}
            for array in self.held[key].values():
                array.flags.writeable = False
        return self.held[key]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_of_a_node_map_one_copy_and_never_write_to_it(
    family: str, dtype: torch.dtype
) -> None:
    shelf = Shelf()
    models = [tiny_model(family).to(dtype) for _ in range(2)]
    writers = find_writers(models[0])
    before, layers = bits(models[0]), max(writer.layer for writer in writers) + 1
    caches = [WeightCache(model, writers, "node", shelf) for model in models]
    alone = WeightCache(tiny := tiny_model(family).to(dtype), writers)
    held = {(k, n): a.copy() for k, own in shelf.held.items() for n, a in own.items()}
    assert len(shelf.held) == len({writer.layer for writer in writers})
    plan, directions = a_plan(writers, "row"), unit_directions(layers)
    for cache, model in zip(caches, models, strict=True):
        with cache.edited(plan, directions), alone.edited(plan, directions):
            assert cache.differs()
            for writer in writers:
                own = model.get_parameter(writer.parameter)
                assert torch.equal(own, tiny.get_parameter(writer.parameter))
        assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())
    for (key, name), array in held.items():
        assert (shelf.held[key][name] == array).all()


def test_a_replica_with_other_weights_than_its_nodes_others_is_refused() -> None:
    shelf, model = Shelf(), tiny_model("llama")
    writers = find_writers(model)
    WeightCache(model, writers, "node", shelf)
    with torch.no_grad():
        model.get_parameter(writers[3].parameter)[0, 0] += 1
    with pytest.raises(ModelError, match=f"{writers[3].parameter} is not what this node's other"):
        WeightCache(model, writers, "node", shelf)


@pytest.mark.gpu
def test_pinned_copies_restore_a_model_on_the_gpu_bit_for_bit() -> None:
    model = tiny_model("llama").bfloat16().cuda()
    writers = find_writers(model)
    before = bits(model)
    for location in ("device", "cpu"):
        cache = WeightCache(model, writers, location)
        with cache.edited(a_plan(writers, "row"), unit_directions(4)):
            assert cache.differs()
        assert all(torch.equal(model.get_parameter(n), old) for n, old in before.items())
