"""Direction methods from the recipe to a scored trial, on the planted model."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import METHOD_NAMES
from tests.support.finished_runs import finish

ENSEMBLE = """
method = "ensemble"
[[direction.ensemble]]
method = "geometric-median"
weight = 0.7
[[direction.ensemble]]
method = "logistic-probe"
weight = 0.3
options = { l2 = 0.1 }
"""
OWN = """
method = "tests.support.own_methods:trimmed_difference"
options = { share = 0.05 }
"""
SUBSPACE = """
method = "svd-subspace"
options = { rank = 3 }
biproject = true
"""
DISCRIMINANTS = ("variance-scaled", "whitened", "leace")
"""Residuals of the planted model vary along the planted direction and hardly elsewhere, so these
turn away from it; see `test_methods.py`."""
SECTIONS = {
    "ensemble": ENSEMBLE,
    "own": OWN,
    "subspace": SUBSPACE,
    **{
        name: f'method = "{name}"\n'
        for name in METHOD_NAMES
        if name not in ("mean-difference", "svd-subspace", *DISCRIMINANTS)
    },
}


def test_positions_inside_the_prompts_end_the_run_with_how_many_there_are(
    planted_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"(?s)direction.positions = 3.*Set it to 1 or less"):
        finish(tmp_path, planted_folder, more="[direction]\npositions = 3\n")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_method_of_the_recipe_finds_the_planted_direction_and_its_trial_is_scored(
    name: str, planted_folder: Path, tmp_path: Path
) -> None:
    found = finish(tmp_path, planted_folder, norm="none", more=f"[direction]\n{SECTIONS[name]}")
    kept = found.directory.directions()
    assert kept is not None
    assert kept.method == found.directory.read_recipe().direction.method
    assert kept.rank == {"subspace": 3, "inlp": 3}.get(name, 1)
    assert (kept.spared is not None) == (name == "subspace")
    r = planted_axes()[0]
    inside = (kept.basis[PLANTED_LAYER] @ r).norm()
    assert float(inside) > 0.99
    assert float(kept.vectors[PLANTED_LAYER] @ r) > (0.9 if kept.rank > 1 else 0.99)
    rate, baseline = found.trial.scorecard["keyword-rate"], found.directory.baseline()
    assert baseline is not None and baseline.scorecard["keyword-rate"].value == 1.0
    assert rate.value == 0.0
    assert torch.equal(kept.rows, found.directory.directions().rows)
