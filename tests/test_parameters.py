"""Parameters by name, and moves in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopipe.errors import UnsupportedError
from autopipe.parameters import move, parameter


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3, bias=False)))


def test_every_parameter_is_found() -> None:
    whole = model()
    assert all(parameter(whole, name) is p for name, p in whole.named_parameters())


@pytest.mark.parametrize("target", ["1.0.bias", "0.none", "2.weight", "0.weight.data"])
def test_what_is_gone_is_an_error(target: str) -> None:
    with pytest.raises(
        UnsupportedError, match="has been replaced by a tensor, or is gone"
    ) as error:
        parameter(model(), target)
    assert f"node: {target}" in str(error.value)


def test_a_moved_tensor_stays_the_same_object() -> None:
    whole = model()
    weight = parameter(whole, "0.weight")
    values, gradient = weight.detach().clone(), torch.ones_like(weight)
    weight.grad = gradient
    move(weight, torch.device("cpu"))  # (tests/system/test_gpu.py moves between devices)
    assert parameter(whole, "0.weight") is weight
    assert torch.equal(weight, values)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)
