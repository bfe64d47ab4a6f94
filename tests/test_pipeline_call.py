"""One call: which tensors get gradients, and what a backward refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopipe.errors import StageError
from tests.support.agreement import assert_close, pipelined


def test_inputs_and_parameters_that_want_a_gradient_get_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, model[0].weight])
    pipelined(model)(x).square().sum().backward()
    assert x.grad is not None
    assert_close(x.grad, expected[0])
    assert_close(model[0].weight.grad, expected[1])
    assert model[0].bias.grad is None


def test_a_second_backward_is_refused() -> None:
    loss = pipelined(nn.Linear(4, 4), devices=1)(torch.randn(7, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(StageError, match="through the same call a second time"):
        loss.backward()


def test_a_parameter_changed_before_the_backward_is_refused_until_it_is_called_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = pipelined(model, devices=1)
    loss = pipe(torch.randn(7, 4)).sum()
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(StageError, match="changed in place between forward and backward") as caught:
        loss.backward()
    assert caught.value.node == "parameter 1.weight"
    pipe(torch.randn(7, 4)).sum().backward()
    assert model[1].weight.grad is not None
