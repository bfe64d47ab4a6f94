"""A pipeline call as one autograd node, with a call of known gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipe.runtime.autograd import PipelineFunction


class Doubled:
    """Outputs 2 x, and x itself, through which no gradient flows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()
        self.received: Sequence[Tensor | None] = ()
        self.grad_enabled: list[bool] = []

    def forward(self) -> tuple[Tensor, ...]:
        self.grad_enabled.append(torch.is_grad_enabled())
        return self.x * 2, self.x

    def differentiable(self) -> Sequence[bool]:
        return True, False

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        self.grad_enabled.append(torch.is_grad_enabled())
        self.received = gradients
        (gradient, _) = gradients
        return (None if gradient is None else gradient * 2,)


def test_gradients_come_from_the_call() -> None:
    x = torch.randn(3, requires_grad=True)
    call = Doubled(x)
    doubled, same = PipelineFunction.apply(call, x)  # type: ignore[no-untyped-call]
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(same, x)
    assert (doubled.requires_grad, same.requires_grad) == (True, False)
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    (doubled * torch.arange(3.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * torch.arange(3.0))
    assert torch.equal(seen[0], x.grad)
    assert call.grad_enabled == [False, False]
    assert call.received[1] is None  # not a tensor of zeros


def test_frozen_tensors_get_nothing() -> None:
    x, frozen = torch.randn(3), torch.randn(3)
    doubled, _ = PipelineFunction.apply(Doubled(x), frozen)  # type: ignore[no-untyped-call]
    assert not doubled.requires_grad
