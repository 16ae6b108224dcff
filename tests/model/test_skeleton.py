"""Skeletons: the names, shapes and types of a model without its weights."""

import pytest
import torch

from ray_abliterate.model.skeleton import build_skeleton, set_tensor, unquantized_skeleton
from ray_abliterate.testing.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("family", ["llama/biases", "mixtral", "gemma3", "falcon_mamba"])
def test_a_skeleton_has_the_models_parameters_and_none_of_its_memory(family: str) -> None:
    model, skeleton = tiny_model(family), build_skeleton(tiny_config(family))
    parameters = dict(model.named_parameters())
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in parameters.items()
    }
    assert all(p.is_meta and not p.requires_grad for p in skeleton.parameters())
    assert not skeleton.training


def test_a_model_that_is_not_quantized_is_its_own_skeleton() -> None:
    model = tiny_model("llama")
    assert unquantized_skeleton(model) is model


def test_a_tensor_can_be_set_by_name() -> None:
    skeleton = build_skeleton(tiny_config("llama"))
    name = "model.norm.weight"
    set_tensor(skeleton, name, torch.full_like(skeleton.get_parameter(name), 2, device="cpu"))
    assert torch.equal(skeleton.get_parameter(name), torch.full((32,), 2.0))
