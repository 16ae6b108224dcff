"""The same plan in both programs' terms."""

import pytest

from benchmarks.versus_heretic.shared_plans import COMPONENTS, draw, to_peer
from ray_abliterate.search.plan import ModelShape, Plan, Profile

SHAPE = ModelShape(30, 576, ("attn", "mlp"))


def peer_strength(parameters: dict[str, float], layer: int) -> float:
    """Return the tent's height by the peer's parameters.

    It falls from max_weight at its position to min_weight at the distance; beyond, it is zero.
    """
    distance = abs(layer - parameters["max_weight_position"])
    if distance > parameters["min_weight_distance"]:
        return 0.0
    share = distance / parameters["min_weight_distance"]
    return (1 - share) * parameters["max_weight"] + share * parameters["min_weight"]


@pytest.mark.parametrize("plan", draw(SHAPE, "row", 20, seed=3))
def test_the_peers_parameters_give_every_layer_our_strength(plan):
    mapped = to_peer(plan)["parameters"]
    for component, name in COMPONENTS.items():
        theirs = [peer_strength(mapped[name], layer) for layer in range(SHAPE.layers)]
        assert theirs == pytest.approx(plan.strengths(component, SHAPE.layers))


def test_a_direction_index_is_given_for_a_global_direction_only():
    profiles = (("attn", Profile(1.0, 20.0, 0.5, 3.0)),)
    shared = to_peer(Plan("global", 12.5, "row", profiles))
    per_layer = to_peer(Plan("per-layer", 12.5, "row", profiles))
    assert shared["direction_index"] == 12.5
    assert per_layer["direction_index"] is None


def test_a_component_that_the_peer_lacks_is_refused():
    plan = Plan("global", 1.0, "row", (("mixer", Profile(1.0, 2.0, 0.5, 3.0)),))
    with pytest.raises(ValueError, match="mixer"):
        to_peer(plan)


def test_points_lie_in_the_peers_default_space_and_follow_the_seed_alone():
    plans = draw(SHAPE, "row", 200, seed=0)
    last = SHAPE.layers - 1
    for plan in plans:
        assert 0.4 * last <= plan.direction_layer <= 0.9 * last
        for _, profile in plan.profiles:
            assert 0.8 <= profile.peak <= 1.5
            assert 0.6 * last <= profile.peak_layer <= last
            assert 1.0 <= profile.reach <= 0.6 * last
    assert {plan.scope for plan in plans} == {"global", "per-layer"}
    assert draw(SHAPE, "row", 5, seed=0) == plans[:5]
