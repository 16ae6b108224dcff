"""Where replicas go."""

import pytest

from ray_abliterate.cluster.placement import (
    Node,
    Placement,
    nodes_for_evaluators,
    nodes_left_by_evaluators,
    place_replicas,
    plan_layout,
    refuse_what_does_not_fit,
)
from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import ModelSettings

GIB = 2.0**30


def node(name: str, cpus: float = 16, gpus: float = 0, memory: float = 64 * GIB) -> Node:
    return Node(name, name, cpus, gpus, memory)


def settings(**given: object) -> ModelSettings:
    return ModelSettings.model_validate({"name": "m", **given})


def nodes_of(places: tuple[Placement, ...]) -> list[str]:
    return [place.node for place in places]


def test_one_replica_a_gpu_and_none_on_nodes_without() -> None:
    places = place_replicas(settings(), [node("head"), node("a", gpus=2), node("b", gpus=1)])
    assert sorted(nodes_of(places)) == ["a", "a", "b"]
    assert [place.index for place in places] == [0, 1, 2]
    assert {place.gpus for place in places} == {1.0}


def test_fractions_never_span_two_cards_and_large_replicas_never_two_nodes() -> None:
    def count(gpus: float, *there: float) -> int:
        nodes = [node(str(i), gpus=g) for i, g in enumerate(there)]
        return len(place_replicas(settings(gpus_per_replica=gpus), nodes))

    assert count(0.25, 1) == 4
    assert count(0.4, 2) == 4  # 2 a card; 5 x 0.4 would fit two cards on paper
    assert count(0.3, 1) == 3
    assert count(2, 3, 3) == 2
    assert count(4, 8) == 2


def test_a_number_of_replicas_is_spread_over_the_nodes() -> None:
    there = [node("a", gpus=4), node("b", gpus=4)]
    assert nodes_of(place_replicas(settings(replicas=3), there)) == ["a", "b", "a"]


def test_without_gpus_cores_and_memory_decide_once_memory_is_known() -> None:
    there = [node("a", cpus=32, memory=40 * GIB), node("b", cpus=4)]
    assert nodes_of(place_replicas(settings(), there)) == ["a", "b"]
    known = place_replicas(settings(), there, replica_bytes=2 * GIB)
    assert sorted(nodes_of(known)) == ["a", "a", "a", "a", "b"]
    assert {p.threads for p in known if p.node == "a"} == {8}
    assert [p.threads for p in known if p.node == "b"] == [4]
    large = place_replicas(settings(), there, replica_bytes=12 * GIB)
    assert sorted(nodes_of(large)) == ["a", "a", "b"]
    assert sum(p.cpus for p in known if p.node == "a") <= 32


def test_the_first_replica_takes_no_more_than_its_share() -> None:
    """The others come once the memory of one is known, and must find room."""
    there = [node("a", cpus=32)]
    first, known = (
        place_replicas(settings(), there),
        place_replicas(settings(), there, replica_bytes=GIB),
    )
    assert first[0] == known[0]


def test_more_than_there_is_is_refused_with_the_numbers() -> None:
    there = [node("a", gpus=1), node("b", gpus=2)]

    def refuse(**given: object) -> None:
        wanted = settings(**given)
        refuse_what_does_not_fit(wanted, there, place_replicas(wanted, there))

    refuse(replicas=3)
    with pytest.raises(ModelError, match=r"gpus_per_replica = 4, but there are 2 GPUs on the larg"):
        refuse(gpus_per_replica=4)
    with pytest.raises(ModelError, match=r"need 4 GPUs, but there are 3; 3 fit"):
        refuse(replicas=4)
    with pytest.raises(ModelError, match="set it to 0"):
        plan_layout(settings(gpus_per_replica=1), 8, 0)


def test_evaluators_and_the_searchs_replicas_share_the_nodes() -> None:
    there = [node("a", cpus=16, gpus=2), node("b", cpus=16, gpus=1)]
    one = settings(replicas=1, gpus_per_replica=1)
    assert nodes_of(place_replicas(one, nodes_for_evaluators(there))) == ["a"]
    left = nodes_left_by_evaluators(one, there)
    assert [n.gpus for n in left] == [1, 1] and [n.cpus for n in left] == [15, 16]
    assert nodes_of(place_replicas(settings(), left)) == ["a", "b"]


@pytest.mark.parametrize(
    ("evaluators", "each", "search", "fit"),
    [(1, 0.25, 0.75, 1), (1, 0.25, 0.25, 3), (2, 0.6, 0.4, 1), (3, 0.5, 0.5, 1), (1, 0.5, 0.6, 1)],
)  # fmt: skip
def test_the_rest_of_a_shared_card_is_the_searchs(
    evaluators: int, each: float, search: float, fit: int
) -> None:
    cards = 2.0 if evaluators > 1 or search == 0.6 else 1.0
    left = nodes_left_by_evaluators(
        settings(replicas=evaluators, gpus_per_replica=each), [node("a", gpus=cards)]
    )
    assert len(place_replicas(settings(gpus_per_replica=search), left)) == fit


def test_without_gpus_evaluators_have_half_of_the_cores() -> None:
    there = [node("a", cpus=8)]
    (place,) = place_replicas(settings(replicas=1), nodes_for_evaluators(there))
    assert place.threads == 4
    assert (
        place_replicas(settings(replicas=1), nodes_left_by_evaluators(settings(replicas=1), there))[
            0
        ].threads
        == 4
    )
    narrow = settings(replicas=1, threads_per_replica=1)
    assert (
        place_replicas(settings(replicas=1), nodes_left_by_evaluators(narrow, there))[0].threads
        == 7
    )


def test_a_card_that_evaluators_take_is_missed_not_replaced_by_the_cpu() -> None:
    there = nodes_left_by_evaluators(
        settings(replicas=1, gpus_per_replica=0.25), [node("a", gpus=1)]
    )
    with pytest.raises(ModelError, match=r"model\.gpus_per_replica = 1, but there are 0\.75 GPUs"):
        refuse_what_does_not_fit(settings(), there, place_replicas(settings(), there))
    wanted = settings(replicas=2, gpus_per_replica=1)
    with pytest.raises(ModelError, match=r"^evaluation\.replicas = 2 of 1 GPUs"):
        alone = nodes_for_evaluators([node("a", gpus=1)])
        refuse_what_does_not_fit(wanted, alone, place_replicas(wanted, alone), "evaluation")


def test_replicas_fit_the_gpus_there_are() -> None:
    def layout(gpus: float, **settings: object) -> tuple[int, float]:
        found = plan_layout(ModelSettings.model_validate({"name": "m", **settings}), 16, gpus)
        return found.replicas, found.gpus

    assert layout(0) == (1, 0)
    assert layout(2, gpus_per_replica=0.4) == (4, 0.4)
    assert layout(8) == (8, 1)
    assert layout(8, gpus_per_replica=2) == (4, 2)
    assert layout(1, gpus_per_replica=0.25) == (4, 0.25)
    assert layout(8, replicas=3) == (3, 1)
    assert layout(8, gpus_per_replica=0, replicas=2) == (2, 0)
    with pytest.raises(ModelError, match="there are 1 GPUs"):
        layout(1, gpus_per_replica=2)
    with pytest.raises(ModelError, match="4 fit"):
        layout(8, gpus_per_replica=2, replicas=5)


def test_cpu_threads_are_shared_out() -> None:
    settings = ModelSettings(name="m", replicas=3)
    assert plan_layout(settings, 7, 0).threads == 2
    assert plan_layout(ModelSettings(name="m", replicas=3), 2, 0).threads == 1
