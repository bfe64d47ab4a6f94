"""Modes of torch around a model: a graph is valid for those that it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.python_state import ambient_settings
from tests.support.agreement import assert_close


class Makes(nn.Module):
    """Makes a tensor of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * torch.arange(4) / torch.tensor([3.0, 7.0, 9.0, 11.0])


def test_another_default_dtype_is_another_graph() -> None:
    model, x = Makes(), torch.randn(6, 4)
    pipe = autopipe.compile(model, 2, 3)
    assert pipe(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        found, expected = pipe(x), model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype == torch.float64
    assert_close(found.detach(), expected.detach())
    assert pipe(x).dtype == torch.float32


def test_settings_can_be_compared() -> None:
    before = ambient_settings()
    assert before == ambient_settings()
    torch.use_deterministic_algorithms(True)
    try:
        assert before != ambient_settings()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.device("meta"):
        assert before != ambient_settings()
    assert before == ambient_settings()


class Leaves(nn.Module):
    def __init__(self, switch: Callable[[], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.switch()
        return y.tanh()


@pytest.mark.parametrize(
    ("switch", "back", "name"),
    [
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
            "get_default_dtype",
        ),
        (
            lambda: torch.set_grad_enabled(False),
            lambda: torch.set_grad_enabled(True),
            "is_grad_enabled",
        ),
        (
            lambda: torch.use_deterministic_algorithms(True),
            lambda: torch.use_deterministic_algorithms(False),
            "are_deterministic",
        ),
    ],
)
def test_a_forward_that_leaves_a_mode_switched_is_refused(
    switch: Callable[[], Any], back: Callable[[], Any], name: str
) -> None:
    try:
        with pytest.raises(CaptureError, match="switches a mode of torch") as caught:
            autopipe.compile(Leaves(switch), 1, 3)(torch.randn(6, 4))
        assert name in str(caught.value.expected)
    finally:
        back()


class Wrapper(nn.Module):
    """Around a model, as a pipeline is: hooks of all modules are called for it, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def shifted(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after compiling"])
@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (register_module_forward_hook, doubled),
        (register_module_forward_pre_hook, shifted),
    ],
)
def test_hooks_of_all_modules(early: bool, register: Any, hook: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(6, 4)
    wrapped, plain = Wrapper(model), model(x)
    pipe = autopipe.compile(model, devices=2, chunks=3)
    if not early:
        torch.testing.assert_close(pipe(x), plain)
    handle = register(hook)
    try:
        torch.testing.assert_close(pipe(x), wrapped(x))
    finally:
        handle.remove()
    torch.testing.assert_close(pipe(x), plain)


def test_a_hook_of_all_modules_that_only_looks_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(6, 4)
    seen: list[str] = []
    handle = register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        with pytest.warns(UserWarning, match="hook of all modules.*returns nothing"):
            autopipe.compile(model, devices=2, chunks=3, args=(x,))
    finally:
        handle.remove()
    assert "Linear" in seen
    assert not {"FlatModel", "Interpreter"} & set(seen)


def test_a_backward_hook_of_all_modules_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(6, 4)
    pipe = autopipe.compile(model, devices=2, chunks=3, args=(x,))
    handle = register_module_full_backward_hook(lambda module, before, after: None)
    try:
        with pytest.raises(CaptureError, match="backward hook of a module"):
            pipe(x)
    finally:
        handle.remove()
    torch.testing.assert_close(pipe(x), model(x))
