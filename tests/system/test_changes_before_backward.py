"""A tensor that changes between forward and backward: an error where eager has one, or no harm.

The truth is eager torch on a copy of the same model: where its backward raises, ours must raise;
where its gradients are those of the forward, ours must be too. Rematerialization reads more than
eager does, so ours may also refuse what eager accepts, but it never returns another gradient.

Covers autopipe/compiled_program.py: what a backward reads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from tests.support.agreement import assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("shift", torch.zeros(4))
        self.table = torch.rand(6)

    def forward(self, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        h = self.b((self.a(x) * self.scale * self.table).tanh())
        h = torch.where(mask[:, None], h * weights[:, None], h)
        return self.c(h.sin()) + self.shift


CHANGES: dict[str, Callable[[Any, list[Tensor]], object]] = {
    "input": lambda net, xs: xs[0].mul_(3),
    "a view of the input": lambda net, xs: xs[0][1:2].fill_(2),
    "second input": lambda net, xs: xs[1].zero_(),
    "boolean input": lambda net, xs: xs[2].logical_not_(),
    "buffer": lambda net, xs: net.scale.mul_(3),
    "buffer that is only added": lambda net, xs: net.shift.add_(1),
    "plain tensor attribute": lambda net, xs: net.table.mul_(2),
    "first weight": lambda net, xs: net.a.weight.mul_(3),
    "inner weight": lambda net, xs: net.b.weight.add_(1),
    "last bias": lambda net, xs: net.c.bias.add_(1),
    "inner bias": lambda net, xs: net.b.bias.add_(1),
    "load_state_dict": lambda net, xs: net.load_state_dict(Net().state_dict()),
    "nothing": lambda net, xs: None,
}


OTHERS = [("none", 1), ("full", 1), ("full", 2), ("min-cut", 1), ("min-cut", 2)]


def outcome(
    model: nn.Module, call: Any, xs: list[Tensor], change: Callable[[Any, list[Tensor]], object]
) -> list[Tensor] | None:
    """The gradients of the model's parameters; None: the backward raised."""
    loss = call(*xs).pow(2).sum()
    with torch.no_grad():
        change(model, xs)
    message = r"changed in place between forward|modified by an inplace operation"
    error: Any = None
    try:
        loss.backward()
    except RuntimeError as caught:
        error = caught
    if error is not None:
        assert re.search(message, str(error))
        assert not isinstance(error, StageError) or (error.node and error.remedy)
        return None
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("remat", "devices"),
    [("none", 2), *(pytest.param(*p, marks=pytest.mark.full) for p in OTHERS)],
)
def test_changes(remat: str, devices: int) -> None:
    torch.manual_seed(0)
    original = Net().double()
    original.table = original.table.double()
    inputs = [torch.randn(6, 4).double(), torch.randn(6).double(), torch.rand(6) > 0.5]
    pipe = None
    for name, change in CHANGES.items():
        eager, model = copy.deepcopy(original), copy.deepcopy(original)
        right = torch.autograd.grad(
            eager(*inputs).pow(2).sum(), list(eager.parameters()), allow_unused=True
        )
        expected = outcome(eager, eager, [x.clone() for x in inputs], change)
        pipe = autopipe.compile(model, devices, 3, remat=remat)
        found = outcome(model, pipe, [x.clone() for x in inputs], change)
        if expected is None:
            assert found is None, name
        if remat == "none" and expected is not None:
            assert found is not None, name
        if found is not None:
            for a, b in zip(found, right, strict=True):
                assert b is not None
                assert_close(a, b)


def test_an_output_that_is_changed_in_place() -> None:
    """With one micro-batch the output can be the saved activation itself."""
    for remat in ("full", "none"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
        x = torch.randn(3, 4, dtype=torch.float64)
        (right,) = torch.autograd.grad(model(x).sum(), model[0].weight)
        out = autopipe.compile(model, 2, 1, remat=remat)(x)
        loss = out.sum()
        with torch.no_grad():
            out.mul_(0)
        error: Any = None
        try:
            loss.backward()
        except StageError as caught:
            error = caught
        if error is None:
            assert_close(model[0].weight.grad, right)
        else:
            assert "changed in place" in str(error)


def test_the_gradients_that_a_step_needs_are_those_of_its_own_forward() -> None:
    """Two forwards, the optimizer's step, then the older backward: refused, and usable after."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    pipe = autopipe.compile(model, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(6, 4, dtype=torch.float64)
    first, second = pipe(x).sum(), pipe(x).sum()
    second.backward()
    optimizer.step()
    with pytest.raises(StageError, match="changed in place") as caught:
        first.backward()
    assert "parameter" in str(caught.value.node)
    model.zero_grad()
    pipe(x).sum().backward()
    found = [p.grad for p in model.parameters()]
    for a, b in zip(
        found, torch.autograd.grad(model(x).sum(), list(model.parameters())), strict=True
    ):
        assert_close(a, b)


def test_another_pattern_of_gradients_reads_the_inputs_again() -> None:
    """A program for other outputs runs the forward again: nothing may have changed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).tanh()
            return h.mean(), h

    model, x = Two(), torch.randn(6, 4)
    _, h = autopipe.compile(model, 1, 3)(x)
    loss = h.sum()
    x.mul_(2)
    with pytest.raises(StageError, match="changed in place") as caught:
        loss.backward()
    assert caught.value.node == "input x"
