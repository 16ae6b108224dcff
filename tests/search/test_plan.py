"""Profiles, plans and the space they are drawn from."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.recipe import COMPONENT_NAMES, SpaceSettings
from ray_abliterate.search.plan import Choice, ModelShape, Plan, Profile, Range, Space

PROFILES = st.builds(
    Profile,
    peak=st.floats(-0.5, 3),
    peak_layer=st.floats(0, 40),
    floor=st.floats(0, 1),
    reach=st.floats(0.01, 40),
)
SHAPES = st.builds(
    ModelShape,
    layers=st.integers(1, 80),
    hidden=st.just(32),
    components=st.lists(st.sampled_from(COMPONENT_NAMES), unique=True, min_size=1).map(tuple),
)
NORMS = st.sampled_from(["none", "row", "column"])


@st.composite
def points(draw, space: Space) -> dict[str, float | str]:
    """A point of a space, as a sampler would choose it."""
    return {
        name: draw(st.sampled_from(domain.options))
        if isinstance(domain, Choice)
        else draw(st.floats(domain.low, domain.high))
        for name, domain in space.parameters
    }


# Profiles


@given(PROFILES, st.integers(1, 80))
def test_strengths_lie_between_zero_and_the_peak(profile, layers):
    strengths = profile.strengths(layers)
    assert len(strengths) == layers
    assert all(0 <= s <= max(profile.peak, 0) * (1 + 1e-12) for s in strengths)


@given(PROFILES, st.integers(1, 80))
def test_nothing_is_edited_beyond_the_reach(profile, layers):
    for layer, strength in enumerate(profile.strengths(layers)):
        if abs(layer - profile.peak_layer) > profile.reach:
            assert strength == 0


@given(PROFILES, st.floats(-2, 0))
def test_a_peak_of_zero_or_below_edits_no_layer(profile, peak):
    assert set(dataclasses.replace(profile, peak=peak).strengths(9)) == {0.0}


@given(PROFILES, st.integers(1, 40))
def test_strength_falls_with_the_distance_from_the_peak(profile, layers):
    strengths = profile.strengths(layers)
    nearest_first = sorted(range(layers), key=lambda layer: abs(layer - profile.peak_layer))
    values = [strengths[layer] for layer in nearest_first]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


def test_the_peak_is_met_at_distance_zero_and_the_floor_at_the_reach():
    profile = Profile(peak=1.2, peak_layer=3.0, floor=0.25, reach=2.0)
    expected = (0.0, 0.3, 0.75, 1.2, 0.75, 0.3, 0.0)
    assert profile.strengths(7) == pytest.approx(expected)


def test_models_of_one_and_two_blocks_have_profiles():
    assert Profile(1.0, 0.0, 0.5, 1.0).strengths(1) == (1.0,)
    assert Profile(1.0, 0.0, 0.5, 1.0).strengths(2) == (1.0, 0.5)
    assert Profile(1.0, 0.5, 1.0, 0.25).strengths(2) == (0.0, 0.0)


@pytest.mark.parametrize(
    "field", [{"floor": -0.1}, {"floor": 1.1}, {"reach": 0.0}, {"reach": -1.0}]
)
def test_a_profile_that_is_no_tent_is_refused(field):
    name = next(iter(field))
    with pytest.raises(ValueError, match=name):
        Profile(**({"peak": 1.0, "peak_layer": 1.0, "floor": 0.5, "reach": 1.0} | field))


# Plans


SPACES = st.sampled_from([SpaceSettings(), SpaceSettings(source_offset=(-0.1, 0.2))])


@given(SHAPES, NORMS, SPACES, st.data())
def test_a_plan_gives_back_the_parameters_it_was_made_of(shape, norm, settings, data):
    space = Space.of(shape, settings, norm)
    params = data.draw(points(space))
    plan = space.plan(params)
    assert plan.to_params() == params
    assert plan.norm == norm


@given(SHAPES, NORMS, SPACES, st.data())
def test_a_plan_survives_json_and_is_a_small_hashable_value(shape, norm, settings, data):
    space = Space.of(shape, settings, norm)
    plan = space.plan(data.draw(points(space)))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert len(plan.to_json().encode()) < 1024
    assert "\n" not in plan.to_json()


def test_a_plan_of_all_six_components_with_long_numbers_stays_below_a_kilobyte():
    profile = Profile(-1.2345678901234567e-5, 12.345678901234567, 1 / 3, 12.345678901234567)
    profiles = tuple((component, profile) for component in sorted(COMPONENT_NAMES))
    plan = Plan("per-layer", 12.345678901234567, "column", profiles, -12.345678901234567)
    assert len(profiles) == 6
    assert len(plan.to_json().encode()) < 1024


def test_a_plan_written_before_there_were_offsets_is_read_as_it_was_meant():
    text = (
        '{"norm":"row","direction_scope":"per-layer","direction_layer":2.5,'
        '"mlp.peak":1.0,"mlp.peak_layer":2.0,"mlp.floor":0.5,"mlp.reach":1.0}'
    )
    plan = Plan.from_json(text)
    assert plan.source_offset is None
    assert plan.to_json() == text


def test_an_offset_is_searched_only_where_the_recipe_says_so_and_starts_at_none():
    shape = ModelShape(11, 32, ("mlp",))
    assert "source_offset" not in dict(Space.of(shape, SpaceSettings(), "row").parameters)
    space = Space.of(shape, SpaceSettings(source_offset=(-0.2, 0.4)), "row")
    assert dict(space.parameters)["source_offset"] == Range(-2.0, 4.0)
    uniform, middle = space.seeds(best_layer=3.0)
    assert (uniform["source_offset"], middle["source_offset"]) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize("missing", ["direction_scope", "direction_layer", "mlp.floor"])
def test_a_missing_parameter_is_named(missing):
    params = Plan.uniform(ModelShape(4, 32, ("mlp",)), 2.0, "row").to_params()
    del params[missing]
    with pytest.raises(ValueError, match=missing):
        Plan.from_params(params, "row")


def test_the_base_model_is_the_plan_that_edits_nothing():
    plan = Plan.nothing()
    assert plan.edits_nothing
    assert plan.strengths("mlp", 3) == (0.0, 0.0, 0.0)
    assert Plan.from_json(plan.to_json()) == plan


@given(SHAPES, st.floats(0.1, 2))
def test_a_uniform_plan_has_one_strength_everywhere(shape, strength):
    plan = Plan.uniform(shape, 1.0, "row", strength)
    assert not plan.edits_nothing
    for component in shape.components:
        assert plan.strengths(component, shape.layers) == pytest.approx([strength] * shape.layers)


def test_a_plan_of_profiles_without_strength_edits_nothing():
    off, on = Profile(-0.2, 1.0, 0.5, 1.0), Profile(0.2, 1.0, 0.5, 1.0)
    assert Plan("global", 1.0, "row", (("attn", off), ("mlp", off))).edits_nothing
    assert not Plan("global", 1.0, "row", (("attn", off), ("mlp", on))).edits_nothing


# Spaces


def holds(domain: Range | Choice, value: float | str) -> bool:
    if isinstance(domain, Choice):
        return value in domain.options
    return domain.low <= value <= domain.high


@given(SHAPES, st.floats(-10, 100))
def test_seed_points_lie_in_the_space(shape, best_layer):
    space = Space.of(shape, SpaceSettings(), "row")
    for seed in space.seeds(best_layer):
        assert seed.keys() == dict(space.parameters).keys()
        assert all(holds(domain, seed[name]) for name, domain in space.parameters)
        assert not space.plan(seed).edits_nothing


def test_the_first_seed_is_as_near_to_full_strength_everywhere_as_the_space_allows():
    settings = SpaceSettings(reach=(0.0, 1.0), peak=(0.5, 2.0), components={})
    seed, _ = Space.of(ModelShape(11, 32, ("attn",)), settings, "row").seeds(6.0)
    assert (seed["attn.peak"], seed["attn.floor"], seed["attn.reach"]) == (1.0, 1.0, 10.0)
    assert seed["direction_layer"] == 6.0
    assert Plan.from_params(seed, "row").strengths("attn", 11) == (1.0,) * 11


@given(SHAPES, st.sampled_from([("global",), ("per-layer",), ("global", "per-layer")]))
def test_ranges_are_the_same_whatever_the_scope(shape, scope):
    own = dict(Space.of(shape, SpaceSettings(scope=scope), "row").parameters)
    both = dict(Space.of(shape, SpaceSettings(), "row").parameters)
    assert own.pop("direction_scope") == Choice(scope)
    del both["direction_scope"]
    assert own == both


@given(SHAPES)
def test_every_range_runs_upwards_and_stays_in_the_model(shape):
    for name, domain in Space.of(shape, SpaceSettings(), "row").parameters:
        if isinstance(domain, Range):
            assert domain.low <= domain.high
            assert math.isfinite(domain.high)
            if name.endswith("layer"):
                assert 0 <= domain.low <= domain.high <= max(shape.layers - 1, 0)
            if name.endswith("reach"):
                assert domain.low >= 1


def test_fractions_of_the_recipe_become_layers():
    space = dict(Space.of(ModelShape(21, 32, ("attn",)), SpaceSettings(), "row").parameters)
    assert space["direction_layer"] == Range(0.4 * 20, 0.9 * 20)
    assert space["attn.peak_layer"] == Range(0.6 * 20, 20.0)
    assert space["attn.reach"] == Range(1.0, 0.6 * 20)
    assert space["attn.peak"] == Range(0.8, 1.5)


def test_a_component_may_have_ranges_of_its_own():
    settings = SpaceSettings(components={"mlp": {"peak": (0.0, 0.0), "floor": (0.5, 0.5)}})
    space = dict(Space.of(ModelShape(5, 32, ("mlp", "attn")), settings, "row").parameters)
    assert space["mlp.peak"] == Range(0.0, 0.0)
    assert space["mlp.floor"] == Range(0.5, 0.5)
    assert space["mlp.reach"] == space["attn.reach"]
    assert space["attn.peak"] == Range(0.8, 1.5)


def test_parameters_do_not_depend_on_the_order_of_components():
    one = Space.of(ModelShape(5, 32, ("mlp", "attn")), SpaceSettings(), "row")
    other = Space.of(ModelShape(5, 32, ("attn", "mlp")), SpaceSettings(), "row")
    assert one.parameters == other.parameters
