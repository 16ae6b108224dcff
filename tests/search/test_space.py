"""The search space of a model: its ranges, and the points worth trying first."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.recipe import COMPONENT_NAMES, SpaceSettings
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.space import CategoricalRange, RealRange, SearchSpace

SHAPES = st.builds(
    ModelShape,
    layers=st.integers(1, 80),
    hidden=st.just(32),
    components=st.lists(st.sampled_from(COMPONENT_NAMES), unique=True, min_size=1).map(tuple),
)


def test_an_offset_is_searched_only_where_the_recipe_says_so_and_starts_at_none():
    shape = ModelShape(11, 32, ("mlp",))
    assert "source_offset" not in dict(SearchSpace.of(shape, SpaceSettings(), "row").parameters)
    space = SearchSpace.of(shape, SpaceSettings(source_offset=(-0.2, 0.4)), "row")
    assert dict(space.parameters)["source_offset"] == RealRange(-2.0, 4.0)
    uniform, middle = space.initial_points(best_layer=3.0)
    assert (uniform["source_offset"], middle["source_offset"]) == (0.0, pytest.approx(1.0))


def holds(domain: RealRange | CategoricalRange, value: float | str) -> bool:
    if isinstance(domain, CategoricalRange):
        return value in domain.options
    return domain.low <= value <= domain.high


@given(SHAPES, st.floats(-10, 100))
def test_initial_points_lie_in_the_space(shape, best_layer):
    space = SearchSpace.of(shape, SpaceSettings(), "row")
    for point in space.initial_points(best_layer):
        assert point.keys() == dict(space.parameters).keys()
        assert all(holds(domain, point[name]) for name, domain in space.parameters)
        assert not space.plan(point).edits_nothing


def test_the_first_point_is_as_near_to_full_strength_everywhere_as_the_space_allows():
    settings = SpaceSettings(reach=(0.0, 1.0), peak=(0.5, 2.0), components={})
    point, _ = SearchSpace.of(ModelShape(11, 32, ("attn",)), settings, "row").initial_points(6.0)
    assert (point["attn.peak"], point["attn.floor"], point["attn.reach"]) == (1.0, 1.0, 10.0)
    assert point["direction_layer"] == 6.0
    assert Plan.from_params(point, "row").strengths("attn", 11) == (1.0,) * 11


@given(SHAPES, st.sampled_from([("global",), ("per-layer",), ("global", "per-layer")]))
def test_ranges_are_the_same_whatever_the_scope(shape, scope):
    own = dict(SearchSpace.of(shape, SpaceSettings(scope=scope), "row").parameters)
    both = dict(SearchSpace.of(shape, SpaceSettings(), "row").parameters)
    assert own.pop("direction_scope") == CategoricalRange(scope)
    del both["direction_scope"]
    assert own == both


@given(SHAPES)
def test_every_range_runs_upwards_and_stays_in_the_model(shape):
    for name, domain in SearchSpace.of(shape, SpaceSettings(), "row").parameters:
        if isinstance(domain, RealRange):
            assert domain.low <= domain.high
            assert math.isfinite(domain.high)
            if name.endswith("layer"):
                assert 0 <= domain.low <= domain.high <= max(shape.layers - 1, 0)
            if name.endswith("reach"):
                assert domain.low >= 1


def test_fractions_of_the_recipe_become_layers():
    space = dict(SearchSpace.of(ModelShape(21, 32, ("attn",)), SpaceSettings(), "row").parameters)
    assert space["direction_layer"] == RealRange(0.4 * 20, 0.9 * 20)
    assert space["attn.peak_layer"] == RealRange(0.6 * 20, 20.0)
    assert space["attn.reach"] == RealRange(1.0, 0.6 * 20)
    assert space["attn.peak"] == RealRange(0.8, 1.5)


def test_a_component_may_have_ranges_of_its_own():
    settings = SpaceSettings(components={"mlp": {"peak": (0.0, 0.0), "floor": (0.5, 0.5)}})
    space = dict(SearchSpace.of(ModelShape(5, 32, ("mlp", "attn")), settings, "row").parameters)
    assert space["mlp.peak"] == RealRange(0.0, 0.0)
    assert space["mlp.floor"] == RealRange(0.5, 0.5)
    assert space["mlp.reach"] == space["attn.reach"]
    assert space["attn.peak"] == RealRange(0.8, 1.5)


def test_parameters_do_not_depend_on_the_order_of_components():
    one = SearchSpace.of(ModelShape(5, 32, ("mlp", "attn")), SpaceSettings(), "row")
    other = SearchSpace.of(ModelShape(5, 32, ("attn", "mlp")), SpaceSettings(), "row")
    assert one.parameters == other.parameters
