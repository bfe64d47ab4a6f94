"""A small network's logits, and a batch that does not divide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.agreement import assert_agrees, pipelined

C = 6
BATCH = 7


class Model(nn.Module):
    """``f(logits, *rest)`` of a small network's logits."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C))
        self.f = f

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.f(self.body(x), *rest)


def inputs(size: int = BATCH, *shape: int) -> Tensor:
    return torch.randn(size, *(shape or (C,))).requires_grad_()


def agrees(f: Callable[..., Any], *rest: Any) -> None:
    """With batches that do not divide, that divide, and that are smaller than `chunks`."""
    pipe = pipelined(Model(f))
    for size in (BATCH, 6, 2):
        assert_agrees(pipe, inputs(size), *(r[:size] for r in rest))
