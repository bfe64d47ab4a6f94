"""Modes of torch around a model: a graph is valid for those that it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
