"""Fingerprints of weights: values stand in files of earlier versions, and tell models apart."""

import pytest
import torch
from torch import nn

from ray_abliterate.model.fingerprint import weights_fingerprint


def a_module() -> nn.Module:
    module = nn.Linear(40, 30)
    with torch.no_grad():
        module.weight.copy_(torch.arange(1200).view(30, 40) / 1000)
        module.bias.copy_(torch.arange(30) / 10)
    module.register_buffer("steps", torch.arange(5))
    return module


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("run", "575eba99fdd0a4fd97f407cad8da5ae72d117da5f7bbd9d0e5708d6869f45c69"),
        ("state", "9349554eea9aef31"),
    ],
)
def test_values_are_those_that_stand_in_run_directories_and_saved_states(
    kind: str, expected: str
) -> None:
    assert weights_fingerprint(a_module(), kind) == expected


@pytest.mark.parametrize("kind", ["run", "state"])
def test_another_value_or_another_name_is_another_model(kind: str) -> None:
    other = a_module()
    with torch.no_grad():
        other.weight[0, 0] += 1
    renamed = nn.Module()
    renamed.register_parameter("gain", other.weight)
    prints = {weights_fingerprint(module, kind) for module in (a_module(), other, renamed)}
    assert len(prints) == 3


def test_a_model_without_parameters_has_a_state_fingerprint_too() -> None:
    assert weights_fingerprint(object(), "state") == "e3b0c44298fc1c14"
