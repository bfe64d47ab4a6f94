"""One story per bug that random graphs have found (`tests/test_random_graphs.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
from tests.support.agreement import assert_agrees, pipelined


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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.mse_loss(x, torch.zeros_like(x)),
        lambda x: x.contiguous(),
        lambda x: x.double() + 1,
        lambda x: F.dropout(x, training=False),
        lambda x: x.flatten(1),
        lambda x: torch.broadcast_tensors(torch.ones(4), x),
    ],
)
def test_a_tensor_looked_at_where_gradients_are_off_keeps_its_own(function: Any) -> None:
    """A metric under ``no_grad``: some calls return the tensor that they were given, and what used
    it afterwards got it from the region, without a gradient."""

    def measured(x: Tensor) -> Tensor:
        with torch.no_grad():
            function(x)
        return torch.tanh(x)

    assert_agrees(pipelined(Model(measured)), batch())


def test_dropout_that_does_nothing_where_gradients_are_off() -> None:
    """In eager torch its result is its argument, which keeps its gradient."""

    def passed(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.dropout(x, training=False)
        return torch.tanh(y)

    assert_agrees(pipelined(Model(passed)), batch())


def test_a_view_made_where_gradients_are_off_has_none() -> None:
    def seen(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.view_as(x)
        return torch.tanh(x) * y

    assert_agrees(pipelined(Model(seen)), batch())


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


def test_a_conjugated_result() -> None:
    """``aten._conj`` had no rule, and a trial did not look at complex numbers: it was refused."""

    class Result(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return torch.complex(x, x * 2).detach().conj(), super().forward(x)

    assert_agrees(pipelined(Result(torch.tanh)), batch())


def test_complex_samples_put_back_in_order_are_tried() -> None:
    """What the rules cannot follow is tried, complex or real."""

    class Sorted(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            order, y = x.argmax(1).argsort(), super().forward(x)
            moved = torch.fft.rfft(y.detach())[order] * 2
            return moved[order.argsort()], y

    assert_agrees(pipelined(Sorted(torch.tanh), devices=1), batch())


def test_a_count_beside_a_differentiable_result() -> None:
    """A result that is reduced over the batch was taken for the loss, though no gradient can come
    from a number of samples; then no program for the backward was made at all."""

    class Counted(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return (x > 0).sum(), super().forward(x)

    assert_agrees(pipelined(Counted(torch.tanh)), batch())


def test_autograd_that_comes_by_with_nothing() -> None:
    """What follows the pipeline may have no gradient to give. Then the program was made anew for
    gradients from no result, and had no backward to run."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    pipe, x = autopipe.compile(Model(torch.tanh), 2, 2), batch()
    (Cut.apply(pipe(x)).sum() + 3 * x.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert all(p.grad is None for p in pipe.parameters())


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_value_and_its_detached_self_are_results(chunks: int) -> None:
    """With one micro-batch the two were one tensor, and marking the second as one without gradient
    took the first one's."""

    class Both(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.detach()

    assert_agrees(pipelined(Both(torch.tanh), chunks=chunks), batch())


@pytest.mark.xfail(
    reason="eager adds and squashes in place, in slices of a row; a pure graph does so in dense"
    " tensors, where vectorised kernels round otherwise",
    strict=True,
)
def test_gru_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.GRU(6, 3, batch_first=True).double()
    x = torch.randn(8, 6, 6, dtype=torch.float64)
    assert torch.equal(pipelined(model, devices=1, chunks=1)(x)[0], model(x)[0])
