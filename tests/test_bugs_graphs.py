"""One story per bug that random graphs have found (`tests/test_random_graphs.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .agreement import assert_agrees, pipelined


class Model(nn.Module):
    """A layer, a function of its result, and another layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def batch(size: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(size, 4, dtype=torch.float64, requires_grad=True)


def test_a_tensor_written_to_where_gradients_are_off_keeps_its_own() -> None:
    """``with torch.no_grad(): x.mul_(2)`` scales the value of `x`, and its gradient still flows as
    if it had not been scaled. The result of the in-place call, which is `x`, was taken for a value
    of the region, without a gradient."""

    def scaled(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2).add_(1)
        return torch.tanh(x)

    assert_agrees(pipelined(Model(scaled)), batch())


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_switched_off_within_autocast(enabled: bool) -> None:
    """torch.export forgot the inner one of the two regions: gradients flowed through it."""

    def rotated(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = torch.sin(x)
            with torch.no_grad():
                z = torch.cos(x)
            return y * z + x

    assert_agrees(pipelined(Model(rotated)), batch())


class Conjugated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.fft.rfft(x).conj().imag)


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_a_conjugated_value_between_stages(devices: int) -> None:
    """``z.conj()`` only sets a bit. The stage that received it had been traced without the bit and
    failed: ``view_as_real doesn't work on unresolved conjugated tensors``."""
    assert_agrees(pipelined(Conjugated(), devices=devices), batch())
