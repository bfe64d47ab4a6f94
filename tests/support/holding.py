"""Models with buffers, and steps of training that write to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.agreement import assert_agrees, assert_close, pipelined


def x(seed: int = 0, *shape: int) -> Tensor:
    """Seven samples that differ in size, for three micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(7, *(shape or (4,)), dtype=torch.float64, generator=generator)
    return drawn * torch.arange(1.0, 8).double().view(-1, *[1] * (drawn.dim() - 1))


class Holds(nn.Module):
    """``forward(self, x)`` is `f`, with a layer and buffers of several shapes at its disposal."""

    def __init__(self, f: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.register_buffer("a", torch.rand(4))
        self.register_buffer("b", torch.rand(4))
        self.register_buffer("table", torch.rand(3, 4))
        self.register_buffer("queue", torch.rand(9, 4))
        self.register_buffer("cube", torch.rand(2, 2, 4))
        self.f = f
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def assert_steps_agree(model: nn.Module, *batches: Tensor, **options: Any) -> autopipe.Pipeline:
    """Two steps of training with an evaluation between, as the model itself makes them."""
    twin, pipe = copy.deepcopy(model), pipelined(model, **{"devices": 1} | options)
    for train, batch in zip((True, False, True), batches, strict=True):
        for part in (pipe, twin):
            part.train(train)
        if train:  # compares with a copy of the model as it is now
            assert_agrees(pipe, batch.clone().requires_grad_())
            with torch.no_grad():
                twin(batch)
        else:
            with torch.no_grad():
                assert_close(pipe(batch), twin(batch))
        names = [n for n, _ in twin.named_buffers()]
        assert [n for n, _ in model.named_buffers()] == names
        for name in names:
            assert_close(model.get_buffer(name), twin.get_buffer(name), name)
    return pipe


def batches(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return x(0, *shape), x(1, *shape), x(2, *shape)


def deep(f: Any) -> nn.Module:
    """With enough before and after for two stages."""
    ends = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double() for _ in range(2)]
    return nn.Sequential(ends[0], Holds(f), ends[1])


every_remat = pytest.mark.parametrize("remat", ["full", "none", "min-cut"])


def counts(s: Any, x: Tensor) -> Tensor:
    s.n = s.n + 1
    return s.layer(x) * s.n
