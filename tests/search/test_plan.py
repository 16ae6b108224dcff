"""Profiles and plans."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.recipe import COMPONENT_NAMES, SpaceSettings
from ray_abliterate.search.plan import ModelShape, Plan, Profile
from ray_abliterate.search.space import CategoricalRange, SearchSpace

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
def points(draw, space: SearchSpace) -> dict[str, float | str]:
    """A point of a space, as a sampler would choose it."""
    return {
        name: draw(st.sampled_from(domain.options))
        if isinstance(domain, CategoricalRange)
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
    space = SearchSpace.of(shape, settings, norm)
    params = data.draw(points(space))
    plan = space.plan(params)
    assert plan.to_params() == params
    assert plan.norm == norm


@given(SHAPES, NORMS, SPACES, st.data())
def test_a_plan_survives_json_and_is_a_small_hashable_value(shape, norm, settings, data):
    space = SearchSpace.of(shape, settings, norm)
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
