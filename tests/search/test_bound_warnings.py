"""Bounds that the frontier leans on."""

from typing import Any

import pytest

from ray_abliterate.recipe import SpaceSettings
from ray_abliterate.search.bound_warnings import bound_warnings
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.score import Score, Scorecard
from ray_abliterate.search.space import RealRange, SearchSpace

SHAPE = ModelShape(11, 32, ("attn", "mlp"))
SPACE = SearchSpace.of(SHAPE, SpaceSettings(), "row")


def frontier(*changes: dict[str, Any], space: SearchSpace = SPACE) -> Frontier:
    """Members in the middle of the space, but for `changes`."""
    middle = {n: d.middle if isinstance(d, RealRange) else "global" for n, d in space.parameters}
    members = []
    for number, change in enumerate(changes):
        scores = (
            Score("a", number, number, number),
            Score("b", -number, -number, -number),
        )
        members.append(Trial(number, space.plan(middle | change), Scorecard(scores), 1.0))
    result = Frontier.of(members)
    assert len(result) == len(changes)
    return result


def test_members_inside_their_ranges_give_no_warning() -> None:
    assert bound_warnings(frontier({}, {}), SPACE) == []


def test_no_members_give_no_warning() -> None:
    assert bound_warnings(Frontier(()), SPACE) == []


def test_a_warning_names_parameter_bound_members_and_setting() -> None:
    members = frontier({"mlp.peak": 1.5}, {}, {"mlp.peak": 1.49})
    assert bound_warnings(members, SPACE) == [
        "mlp.peak is at its upper bound 1.5 in 2 of 3 frontier members that use it "
        "(trial 0, 2): widen search.space.components.mlp.peak"
    ]


def test_one_stray_member_gives_no_warning() -> None:
    assert bound_warnings(frontier({"mlp.peak": 1.5}, *[{}] * 5), SPACE) == []


def test_layers_are_also_given_as_the_recipe_writes_them() -> None:
    (warning,) = bound_warnings(frontier({"attn.peak_layer": 6.0}), SPACE)
    assert "lower bound layer 6 (0.6 in the recipe) in 1 of 1 frontier member " in warning
    (warning,) = bound_warnings(frontier({"attn.reach": 6.0}), SPACE)
    assert "upper bound 6 layers (0.6 in the recipe)" in warning
    (warning,) = bound_warnings(frontier({"direction_layer": 4.0}), SPACE)
    assert "lower bound layer 4 (0.4 in the recipe)" in warning
    assert warning.endswith("widen search.space.direction_layer")


@pytest.mark.parametrize(("value", "warned"), [(1.4865, True), (1.485, False)])
def test_a_bound_reaches_two_percent_into_its_range(value: float, warned: bool) -> None:
    assert bool(bound_warnings(frontier({"attn.peak": value}), SPACE)) is warned


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn.floor", 0.0),
        ("attn.floor", 1.0),
        ("attn.peak_layer", 10.0),
        ("attn.reach", 1.0),
        ("mlp.peak", -0.25),
    ],
)
def test_an_end_beyond_which_nothing_lies_is_no_bound(name: str, value: float) -> None:
    assert bound_warnings(frontier({name: value}), SPACE) == []


def test_a_natural_end_that_the_recipe_moved_inwards_is_a_bound() -> None:
    space = SearchSpace.of(SHAPE, SpaceSettings(floor=(0.2, 0.8), peak_layer=(0.5, 0.9)), "row")
    changes = {"attn.floor": 0.2}, {"attn.floor": 0.8}, {"mlp.peak_layer": 9.0}
    warnings = bound_warnings(frontier(*changes, space=space), space)
    assert [warning.split()[0] for warning in warnings] == [
        "attn.floor",
        "attn.floor",
        "mlp.peak_layer",
    ]


def test_a_component_that_is_switched_off_has_no_bounds() -> None:
    off = {"mlp.peak": -0.1, "mlp.peak_layer": 6.0, "mlp.reach": 6.0}
    (warning,) = bound_warnings(frontier(off, {"mlp.reach": 6.0}), SPACE)
    assert warning.startswith("mlp.reach") and "1 of 1 frontier member that" in warning


def test_the_direction_layer_counts_only_where_it_is_used() -> None:
    unused = {"direction_scope": "per-layer", "direction_layer": 9.0}
    assert bound_warnings(frontier(unused), SPACE) == []


def test_an_offset_counts_only_where_it_is_used() -> None:
    space = SearchSpace.of(SHAPE, SpaceSettings(source_offset=(-0.2, 0.2)), "row")
    high = dict(space.parameters)["source_offset"].high
    unused = {"direction_scope": "global", "source_offset": high}
    assert bound_warnings(frontier(unused, space=space), space) == []
    used = {"direction_scope": "per-layer", "source_offset": high}
    (warning,) = bound_warnings(frontier(used, space=space), space)
    assert "source_offset is at its upper bound" in warning
    assert "layers (0.2 in the recipe)" in warning and "search.space.source_offset" in warning


def test_a_lower_bound_of_the_peak_above_zero_is_worth_widening() -> None:
    (warning,) = bound_warnings(frontier({"attn.peak": 0.8}), SPACE)
    assert "attn.peak is at its lower bound 0.8" in warning


def test_a_parameter_that_the_recipe_fixed_is_never_warned_about() -> None:
    space = SearchSpace.of(SHAPE, SpaceSettings(reach=(0.4, 0.4), peak_layer=(0.7, 0.7)), "row")
    assert bound_warnings(frontier({}, space=space), space) == []


def test_the_most_frequent_bound_comes_first() -> None:
    members = frontier({"attn.peak": 1.5}, {"mlp.peak": 1.5}, {"mlp.peak": 1.5})
    assert [w.split()[0] for w in bound_warnings(members, SPACE)] == ["mlp.peak", "attn.peak"]


def test_a_model_of_one_layer_has_no_layer_bounds() -> None:
    space = SearchSpace.of(ModelShape(1, 32, ("attn",)), SpaceSettings(), "row")
    assert bound_warnings(frontier({}, space=space), space) == []
