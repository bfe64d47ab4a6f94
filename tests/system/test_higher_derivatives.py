"""``create_graph=True`` through a pipeline: gradients of gradients equal eager torch's.

Covers autopipe/higher_derivatives.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import StageError
from tests.support.agreement import assert_close


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)
    )


def penalty(net: Any, x: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017, section 4): 10 (|∇D| - 1)², beside the critic's own loss."""
    mix = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(mix).sum(), mix, create_graph=True)
    return net(x * 2).mean() - net(x).mean() + 10 * ((g.norm(dim=1) - 1) ** 2).mean()


def r1(net: Any, x: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): the same call is differentiated twice, then once more."""
    x = x.clone().requires_grad_()
    out = net(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.softplus(-out).mean() + g.square().sum(1).mean()


def weights_of_weights(net: Any, x: Tensor) -> Tensor:
    """Gradients of parameters, differentiated (MAML, influence, Hessian products)."""
    loss = net(x).square().mean()
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return loss + sum(((g**2).sum() for g in grads), torch.zeros(()))


def third(net: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return h.square().mean()


@pytest.mark.parametrize("loss", [penalty, r1, weights_of_weights, third])
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_equal_to_eager(loss: Any, remat: str, chunks: int) -> None:
    model = critic().double()
    eager = copy.deepcopy(model)
    x = torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 2, chunks, remat=remat)
    expected, found = loss(eager, x), loss(pipe, x)
    assert_close(found, expected)
    expected.backward()
    found.backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert a.grad is not None
            assert_close(a.grad, b.grad)


def test_the_first_derivative_is_the_same_with_and_without_a_graph() -> None:
    model = critic()
    pipe = autopipe.compile(model, 2, 3)
    x = torch.randn(6, 4)
    plain = torch.autograd.grad(pipe(x).sum(), list(model.parameters()))
    graph = torch.autograd.grad(pipe(x).sum(), list(model.parameters()), create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert graph[0].requires_grad


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_dropout_draws_the_same_numbers_again(p: float) -> None:
    """A gradient for which the penalty is taken must be that of the forward's own masks."""
    torch.manual_seed(0)
    drop = nn.Dropout(p)
    model = nn.Sequential(nn.Linear(4, 50), drop, nn.Tanh(), nn.Linear(50, 50), nn.Dropout(p))
    pipe = autopipe.compile(model, 2, 3)
    x = torch.randn(6, 4, requires_grad=True)
    out = pipe(x)
    (a,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (b,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(a, b)


def test_a_loss_inside_the_model_and_a_buffer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6, False), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.b(self.norm(self.a(x)).tanh()), y)

    torch.manual_seed(0)
    model = Net().double()
    eager = copy.deepcopy(model)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, -100, -100])
    totals = []
    for net in (eager, autopipe.compile(model, 2, 1)):
        z = x.clone().requires_grad_()
        loss = net(z, y)
        (g,) = torch.autograd.grad(loss, z, create_graph=True)
        (loss + g.square().sum()).backward()
        totals.append([p.grad for p in net.parameters()])
    for p, q in zip(*totals, strict=True):
        assert p is not None
        assert q is not None
        assert_close(q, p)
    assert_close(model.norm.running_mean, eager.norm.running_mean)  # written once, not twice


def test_a_graph_through_a_released_call_is_refused() -> None:
    pipe = autopipe.compile(critic(), 2, 3)
    x = torch.randn(6, 4, requires_grad=True)
    loss = pipe(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(StageError, match="second time"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_an_input_that_changes_before_its_gradient_is_refused() -> None:
    pipe = autopipe.compile(critic(), 2, 3)
    x = torch.randn(6, 4)
    loss = pipe(x).sum()
    x.mul_(2)
    with pytest.raises(StageError, match="changed in place"):
        torch.autograd.grad(loss, list(pipe.parameters()), create_graph=True)


def test_autocast_is_that_of_the_call() -> None:
    model = critic()
    pipe = autopipe.compile(model, 2, 1)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x).float().sum(), pipe(x).float().sum()
    wanted = list(model.parameters())
    a = torch.autograd.grad(expected, wanted, create_graph=True)
    b = torch.autograd.grad(found, wanted, create_graph=True)
    for p, q in zip(a, b, strict=True):
        assert_close(q, p, 1e-2)
