"""Which layer a search begins at: by what was measured, and by nothing else."""

import json
from typing import Any

import pytest

from ray_abliterate.directions.layer_selection import LayerScores, LayerSelection, tried_layers
from ray_abliterate.directions.layer_separation import best_layer

BASE = (5.0, -6.0)


def scores(layer: int, ablated: float, added: float = 1.0, divergence: float = 0.05) -> LayerScores:
    return LayerScores(layer, ablated, added, divergence, BASE)


def selection(*found: LayerScores) -> LayerSelection:
    return LayerSelection("key", "mean-difference", 10, found)


def test_the_last_fifth_and_layers_without_a_direction_are_not_tried() -> None:
    assert tried_layers([True] * 10) == tuple(range(8))
    assert tried_layers([False, True] * 5) == (1, 3, 5, 7)
    assert tried_layers([True]) == (0,)
    assert tried_layers([True] * 32)[-1] == 25  # 26 of 32, as `best_layer` takes them


def test_the_layer_that_passes_and_leaves_least_is_chosen() -> None:
    found = selection(
        scores(0, -9.0, added=-0.1),
        scores(1, -8.0, divergence=0.11),
        LayerScores(2, None, None, None, BASE, "the model's logits are not numbers"),
        scores(3, -2.0),
        scores(4, -4.0, added=0.01, divergence=0.1),
        scores(5, -4.0),
    )
    assert found.chosen == found.scores[4]
    assert [one.rejection for one in found.scores] == [
        "adding it does not cause refusals",
        "changes neutral prompts by more than 0.1",
        "the model's logits are not numbers",
        "", "", "",
    ]  # fmt: skip
    best = "layer 4 has the best direction (mean-difference): removing it takes refusals from 5.00"
    assert f"{best} to -4.00 nats" in found.sentence()
    assert found.rows()[0] == ["base model", "5.00", "-6.00", "", ""]
    assert found.rows()[3] == ["2", "", "", "", "the model's logits are not numbers"]
    assert found.rows()[5] == ["4", "-4.00", "0.01", "0.100", "chosen"]


@pytest.mark.parametrize("added", [0.0, -1.0])
def test_no_layer_is_chosen_where_none_passes(added: float) -> None:
    found = selection(scores(0, -9.0, added=added), scores(1, -9.0, divergence=0.2))
    assert found.chosen is None
    assert "the direction (mean-difference) of none of the 2 layers passes" in found.sentence()
    assert selection().rows()[0][0] == "base model"


def test_json_gives_back_the_same_selection_and_says_what_was_chosen() -> None:
    broken = LayerScores(1, None, None, None, BASE, "broken")
    found = selection(scores(0, -1.5), broken)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert LayerSelection.from_json(json.loads(text)) == found
    values: dict[str, Any] = json.loads(text)
    assert values["chosen"] == 0 and values["scores"][1]["dropped"] == "broken"


def test_the_best_layer_is_that_of_the_measure_and_fisher_tells_equals_apart() -> None:
    measures = ("fisher", "auroc", "silhouette", "mutual_information")
    values = [(1, 1.0, 0.1, 0.2), (3, 1.0, 0.3, 0.1), (2, 0.9, 0.4, 0.9), (2, 0.2, 0.2, 0.9),
              (9, 1.0, 0.9, 1.0)]  # fmt: skip
    rows = [
        {"layer": layer, **dict(zip(measures, row, strict=True))}
        for layer, row in enumerate(values)
    ]
    assert [best_layer(rows, by) for by in measures] == [1, 1, 2, 2]
    assert best_layer(rows) == 1
