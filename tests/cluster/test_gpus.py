"""Replicas on real GPUs: fractions of one card, and one replica over two."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.cluster.connection import connect
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.builtin.planted_model import planted_axes
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.search.plan import Plan

pytestmark = [pytest.mark.ray, pytest.mark.gpu]


def on_gpus(recipe: Recipe, replicas: int, gpus: float) -> Recipe:
    """The recipe in bfloat16 on so much of the cards."""
    own = {"replicas": replicas, "gpus_per_replica": gpus, "dtype": "bfloat16"}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=own)})


@pytest.fixture
def cards(cluster: object) -> int:
    """A node of the cluster with all cards that there are."""
    count = torch.cuda.device_count()
    node = cluster.add_node(num_cpus=4, num_gpus=count)
    yield count
    cluster.remove_node(node)


def scores(recipe: Recipe, planted: Path, sets: dict[str, PromptSet]) -> tuple[str, list[object]]:
    """The device, and the scorecards of a few plans, each from whatever replica is free."""
    connect(dashboard=False)
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    with ReplicaPool.start(recipe, str(planted), sets) as pool:
        shared, shape = pool.put(setup), pool.facts.shape
        plans = [Plan.uniform(shape, 2.3, "none", strength) for strength in (0.5, 1.0)] * 2
        found = pool.map(
            ReplicaApi.evaluate, [(plan, shared.argument) for plan in plans], most_out=1
        )
        return pool.facts.device, [evaluation.scorecard for evaluation in found]


def test_replicas_share_a_card_as_fractions_and_score_alike(
    cards: int, recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet
) -> None:
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    device, found = scores(on_gpus(recipe, 2, 0.5), planted, sets)
    assert device.startswith("cuda")
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    _, alone = scores(on_gpus(recipe, 1, 1.0), planted, sets)
    assert alone == found


def test_a_replica_is_spread_over_two_cards(
    cards: int, recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet
) -> None:
    if cards < 2:
        pytest.skip("needs two GPUs")
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    _, spread = scores(on_gpus(recipe, 1, 2.0), planted, sets)
    _, alone = scores(on_gpus(recipe, 1, 1.0), planted, sets)
    assert spread == alone
