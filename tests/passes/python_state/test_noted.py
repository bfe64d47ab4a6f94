"""What a forward asks torch and the process for: answered as in eager mode, compared in each call.

Covers python_state/noted.py and `CallModes` of python_state/ambient.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, is_grad_enabled, nn
from torch.overrides import TorchFunctionMode

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_close


class Net(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use
        self.table = torch.ones(4, dtype=torch.float64)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self, self.a(x).tanh()))


def made(use: Callable[[Any, Tensor], Tensor]) -> tuple[Net, Any, Tensor]:
    model = Net(use)
    return model, autopipe.compile(model, 2, 3), torch.randn(6, 4, dtype=torch.float64)


def scaled(condition: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, h: h * 2 if condition(net, h) else h * 3


def restored(net: Any, h: Tensor) -> bool:
    with torch.no_grad():
        inner = torch.is_grad_enabled()
    return torch.is_grad_enabled() and not inner


MODES: dict[str, Callable[[Any, Tensor], Any]] = {
    "gradients": lambda net, h: torch.is_grad_enabled(),
    "gradients, in training only": lambda net, h: net.training and torch.is_grad_enabled(),
    "gradients, switched inside": restored,
    "inference mode": lambda net, h: torch.is_inference_mode_enabled(),
    "requires_grad of an activation": lambda net, h: h.requires_grad,
    "requires_grad of a weight": lambda net, h: net.b.weight.requires_grad,
}


def around(mode: str, net: Any, x: Tensor) -> Tensor:
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts[mode]() if mode in contexts else torch.enable_grad():
        found: Tensor = net(x)
    return found


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("first", ["grad", "no_grad", "inference"])
def test_a_mode_that_the_forward_reads(name: str, first: str) -> None:
    model, pipe, x = made(scaled(MODES[name]))
    for mode in (first, "grad", "no_grad", "inference", "grad"):
        assert_close(around(mode, pipe, x), around(mode, model, x))
    for frozen in (True, False):
        model.requires_grad_(not frozen)
        assert_close(pipe(x), model(x))


def test_gradients_are_those_of_the_branch() -> None:
    model, pipe, x = made(scaled(MODES["gradients"]))
    with torch.no_grad():
        pipe(x)
    gradients = []
    for net in (model, pipe):
        model.zero_grad()
        net(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_modes_that_are_not_read_cost_no_capture() -> None:
    model, pipe, x = made(lambda net, h: h)
    pipe(x)
    first = pipe.captured
    around("no_grad", pipe, x)
    model.a.requires_grad_(False)
    pipe(x)
    assert pipe.captured is first


def test_autocast_and_threads() -> None:
    model, pipe, x = made(scaled(lambda net, h: torch.is_autocast_enabled("cpu")))
    assert_close(pipe(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pipe(x), model(x), rtol=1e-2, atol=1e-2)
    assert_close(pipe(x), model(x))
    before = torch.get_num_threads()
    model, pipe, x = made(lambda net, h: h * torch.get_num_threads())
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_close(pipe(x), model(x))
    finally:
        torch.set_num_threads(before)


def test_a_mode_that_is_asked_for_by_another_name_is_refused() -> None:
    model, pipe, x = made(scaled(lambda net, h: is_grad_enabled()))
    assert_close(pipe(x), model(x))
    with torch.no_grad(), pytest.raises(CaptureError, match="asks for a mode") as caught:
        pipe(x)
    assert __file__ in str(caught.value.source)
    assert "torch.is_grad_enabled()" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "read", [lambda w: 2.0 if w.grad is None else 3.0, lambda w: w.grad, lambda w: [w.grad][0]]
)
def test_the_gradient_of_a_weight_is_refused(read: Any) -> None:
    model, pipe, x = made(lambda net, h: h * 1 if read(net.b.weight) is None else h)
    with pytest.raises(CaptureError, match="reads the gradient of a parameter") as caught:
        pipe(x)
    assert caught.value.found == "b.weight.grad"
    assert __file__ in str(caught.value.source)
    assert type(model(x)) is Tensor


def freezes(net: Any, h: Tensor) -> Tensor:
    net.b.weight.requires_grad_(False)
    return h


def freezes_by_assignment(net: Any, h: Tensor) -> Tensor:
    net.b.weight.requires_grad = False
    return h


def freezes_all(net: Any, h: Tensor) -> Tensor:
    net.b.requires_grad_(False)
    return h


def freezes_by_another_way(net: Any, h: Tensor) -> Tensor:
    for p in [*net.b.parameters()][:1]:
        p.requires_grad_(requires_grad=False)
    return h


@pytest.mark.parametrize(
    "freeze", [freezes, freezes_by_assignment, freezes_all, freezes_by_another_way]
)
def test_a_forward_that_freezes_a_weight_is_refused(freeze: Any) -> None:
    model, pipe, x = made(freeze)
    with pytest.raises(CaptureError, match="sets requires_grad") as caught:
        pipe(x)
    assert caught.value.found == "b.weight"
    assert __file__ in str(caught.value.source)
    assert all(p.requires_grad for p in model.parameters())


def test_a_flag_that_stays_as_it_is_may_be_set() -> None:
    model, pipe, x = made(lambda net, h: (net.b.requires_grad_(True), h)[1])
    assert_close(pipe(x), model(x))


class Doubles(TorchFunctionMode):
    """Doubles what tanh returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is Tensor.tanh else found


def test_a_function_mode_around_a_call() -> None:
    model, pipe, x = made(lambda net, h: h)
    assert_close(pipe(x), model(x))
    plain, mode = pipe.captured, Doubles()
    for _ in range(2):
        with mode:
            expected = model(x)
            assert_close(pipe(x), expected)
        inside = pipe.captured
        assert not torch.equal(expected, model(x))
        assert_close(pipe(x), model(x))
        assert pipe.captured is plain
    with mode:
        pipe(x)
        assert pipe.captured is inside
    with torch.device("cpu"):  # a mode, too, but one of the other settings
        assert_close(pipe(x), model(x))


VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "list": lambda net, h: h * net.table.tolist()[0],
    "number": lambda net, h: h * net.table[0].item(),
    "through a view": lambda net, h: h * net.table[:2].tolist()[1],
    "through detach": lambda net, h: h * sum(net.table.detach().tolist()),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_a_tensor_that_become_numbers(name: str) -> None:
    model, pipe, x = made(VALUES[name])
    for value in (1.0, 2.0, 3.0):
        model.table.fill_(value)
        assert_close(pipe(x), model(x))


VARIABLE = "AUTOPIPE_TEST_SCALE"
ENVIRONMENT: dict[str, Callable[[], Any]] = {
    "item": lambda: os.environ[VARIABLE],
    "get": lambda: os.environ.get(VARIABLE, "1"),
    "getenv": lambda: os.getenv(VARIABLE, "1"),
    "in": lambda: 2.0 if VARIABLE in os.environ else 3.0,
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_variables_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipe, x = made(lambda net, h: h * float(ENVIRONMENT[name]()))
    monkeypatch.setenv(VARIABLE, "2")
    assert_close(pipe(x), model(x))
    first = pipe.captured
    monkeypatch.setenv("AUTOPIPE_TEST_OTHER", "2")
    pipe(x)
    assert pipe.captured is first
    monkeypatch.setenv(VARIABLE, "5")
    assert_close(pipe(x), model(x))
    if name != "item":
        monkeypatch.delenv(VARIABLE)
        assert_close(pipe(x), model(x))
