"""Tensors that a forward reaches around the model's names, assigns or keeps.

Covers python_state/leftovers.py. Results and gradients are compared with eager torch on a copy.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_close


class Net(nn.Module):
    def __init__(self, prepare: Callable[[Any], Any], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.full((8,), 0.5))
        self.use = use
        self.double()
        self.held = prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, self.first(x)))


def closure(net: Any) -> Callable[[Tensor], Tensor]:
    scale = net.scale
    return lambda h: h * scale


class Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


REGISTERED: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "dict": (lambda n: {"a": n.scale}, lambda n, h: h * n.held["a"]),
    "list": (lambda n: [n.scale], lambda n, h: h * n.held[0]),
    "closure": (closure, lambda n, h: n.held(h)),
    "object": (lambda n: Holder(n.scale), lambda n, h: h * n.held.tensor),
    "layer in a list": (lambda n: [n.first], lambda n, h: h + n.held[0].bias),
    "bound method": (lambda n: n.last.forward, lambda n, h: h + n.held(h).sum(1, keepdim=True)),
    "buffer": (lambda n: {"b": n.shift}, lambda n, h: h * n.scale + n.held["b"]),
    "in a list of arguments": (
        lambda n: [n.scale],
        lambda n, h: h * torch.stack([n.held[0], n.shift]).sum(0),
    ),
    "keyword": (
        lambda n: [n.scale],
        lambda n, h: torch.nn.functional.layer_norm(h, (8,), weight=n.held[0]),
    ),
    "method of the tensor": (lambda n: [n.scale], lambda n, h: n.held[0].mul(h)),
    "operator": (lambda n: [n.scale], lambda n, h: n.held[0] * h),
    "view of it": (lambda n: [n.scale], lambda n, h: h * n.held[0][:1]),
    "custom function": (lambda n: [n.scale], lambda n, h: Double.apply(h, n.held[0])),
}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return gradient * scale * 2, (gradient * x * 2).sum(0)


@pytest.mark.parametrize("name", REGISTERED)
def test_a_parameter_or_buffer_that_is_reached_by_another_way_is_itself(name: str) -> None:
    model = Net(*REGISTERED[name])
    x = torch.randn(6, 4, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    pipe = autopipe.compile(model, 2, 3)
    pipe(x).pow(2).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is None) == (expected[n] is None), n
        if p.grad is not None:
            assert_close(p.grad, expected[n], n)
    with torch.no_grad():  # and a step of the optimizer is seen
        for p in model.parameters():
            p.add_(0.1)
        model.shift.mul_(2)
    assert_close(pipe(x), model(x))


OUTSIDE = nn.Parameter(torch.ones(8, dtype=torch.float64))


def unregistered(value: Any) -> Callable[[Any], Any]:
    return lambda n: value() if callable(value) else value


REFUSED: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "module-level parameter": (lambda n: None, lambda n, h: h * OUTSIDE),
    "parameter in a list": (
        lambda n: [nn.Parameter(torch.ones(8).double())],
        lambda n, h: h * n.held[0],
    ),
    "layer in a list": (lambda n: [nn.Linear(8, 8).double()], lambda n, h: n.held[0](h)),
    "computed in __init__": (lambda n: [n.scale * 2], lambda n, h: h * n.held[0]),
    "plain tensor that needs a gradient": (
        lambda n: {"w": torch.ones(8).double().requires_grad_()},
        lambda n, h: h * n.held["w"],
    ),
    "view of a weight": (lambda n: {"w": n.scale[:1]}, lambda n, h: h * n.held["w"]),
    "closure": (
        lambda n: (lambda w: lambda h: h * w)(nn.Parameter(torch.ones(8).double())),
        lambda n, h: n.held(h),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_tensor_that_needs_a_gradient_is_refused_by_place(name: str) -> None:
    model = Net(*REFUSED[name])
    with pytest.raises(CaptureError, match="is no parameter of the model") as caught:
        autopipe.compile(model, 2, 3)(torch.randn(6, 4, dtype=torch.float64))
    assert __file__ in str(caught.value.source)
    assert "register it" in str(caught.value.remedy)
    assert "of shape (" in str(caught.value.found)
    place = str(caught.value.found)
    assert any(word in place for word in ("held", "OUTSIDE", "weight", "w (a variable"))


def test_a_model_that_has_no_parameter_of_its_own() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [nn.Parameter(torch.ones(4))]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scales[0]

    with pytest.raises(CaptureError, match="is no parameter of the model") as caught:
        autopipe.compile(Bare(), 1, 2)(torch.randn(4, 4))
    assert "scales" in str(caught.value.found)


CONSTANT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "detached": (lambda n: [n.scale.detach().clone()], lambda n, h: h * n.held[0]),
    "frozen layer in a list": (
        lambda n: [nn.Linear(8, 8).double().requires_grad_(False)],
        lambda n, h: n.held[0](h),
    ),
    "under no_grad": (
        lambda n: [nn.Linear(8, 8).double()],
        lambda n, h: h + torch.no_grad()(n.held[0])(h),
    ),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_tensor_that_needs_no_gradient_is_a_constant(name: str) -> None:
    model = Net(*CONSTANT[name])
    x = torch.randn(6, 4, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    expected = model.first.weight.grad
    model.zero_grad()
    pipe = autopipe.compile(model, 2, 3)
    pipe(x).pow(2).sum().backward()
    assert_close(model.first.weight.grad, expected)


# ------------------------------------------------------------------------ what is assigned


class Assigns(nn.Module):
    def __init__(self, assign: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))
        self.total = torch.zeros(4)
        self.history = [torch.zeros(4)]
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x).tanh()
        self.assign(self, y)
        return y + self.mean


SEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "data of a buffer": lambda n, y: setattr(n.mean, "data", n.mean * 0.5),
    "a buffer": lambda n, y: setattr(n, "mean", n.mean * 0.5),
    "in place": lambda n, y: n.mean.mul_(0.5),
    "through data": lambda n, y: n.mean.data.mul_(0.5),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_buffer_is_written_once_a_step(name: str) -> None:
    model = Assigns(SEEN[name]).double()
    eager = copy.deepcopy(model)
    pipe = autopipe.compile(model, 2, 3)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(6, 4, dtype=torch.float64)
        assert_close(pipe(x), eager(x))
        assert_close(model.mean, eager.mean)


def replaces_a_parameter(net: Any, y: Tensor) -> None:
    net.l.weight = nn.Parameter(net.l.weight.detach() * 0.5)


def replaces_a_layer(net: Any, y: Tensor) -> None:
    net.l = nn.Linear(4, 4)


def adds_a_layer(net: Any, y: Tensor) -> None:
    if not hasattr(net, "more"):
        net.more = nn.Linear(4, 4)


def removes_a_layer(net: Any, y: Tensor) -> None:
    if hasattr(net, "k"):
        del net.k


def in_a_list(net: Any, y: Tensor) -> None:
    with torch.no_grad():
        net.history[0].add_(y.mean(0))


COUNT = torch.zeros(4)


def in_a_global(net: Any, y: Tensor) -> None:
    with torch.no_grad():
        COUNT.add_(y.mean(0))


def view_of_an_attribute(net: Any, y: Tensor) -> None:
    with torch.no_grad():
        net.total[:2] += 1


UNSEEN: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "parameter": (replaces_a_parameter, "replaces a parameter", "l.weight"),
    "layer": (replaces_a_layer, "replaces a module", "l"),
    "new layer": (adds_a_layer, "replaces a module", "more"),
    "layer removed": (removes_a_layer, "replaces a module", "k"),
    "data of an activation": (lambda n, y: setattr(y, "data", y.data * 2), "assigns the .data", ""),
    "data of another shape": (
        lambda n, y: setattr(n.mean, "data", torch.ones(1)),
        "assigns the .data",
        "mean",
    ),
    "plain attribute": (lambda n, y: n.total.add_(1), "is not a buffer", "total"),
    "view of an attribute": (view_of_an_attribute, "is not a buffer", "total"),
    "in a list": (in_a_list, "is not a buffer", ""),
    "module-level tensor": (in_a_global, "is not a buffer", ""),
    "out=": (
        lambda n, y: torch.add(n.total, 1, out=n.total),
        "is not a buffer",
        "total",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_other_assignments_are_refused_and_undone(name: str) -> None:
    assign, message, found = UNSEEN[name]
    model = Assigns(assign)
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(CaptureError, match=message) as caught:
        autopipe.compile(model, 2, 3)(torch.randn(6, 4))
    assert found in str(caught.value.found)
    assert caught.value.remedy
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[n] is t and torch.equal(t, value) for n, (t, value) in before.items())
    assert torch.equal(model.total, torch.zeros(4))
    assert torch.equal(COUNT, torch.zeros(4))


def test_a_place_that_nothing_restores_is_named() -> None:
    """A tensor kept where no name of the forward's code leads is found by who refers to it."""
    globals()["STASH"] = []
    name = ["ST", "ASH"]

    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.l(x).tanh()
            globals()["".join(name)].append(y)
            return y

    try:
        with pytest.raises(CaptureError, match="keeps tensors of the capture") as caught:
            autopipe.compile(Stores(), 1, 3)(torch.randn(6, 4))
        assert "STASH" in str(caught.value.found)
    finally:
        del globals()["STASH"]
        gc.collect()
