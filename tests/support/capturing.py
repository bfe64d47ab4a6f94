"""Small models around a function, for tests of what capture makes of it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

D = 6
BATCH = 7

Pair = collections.namedtuple("Pair", ["left", "right"])


class Model(nn.Module):
    """Two layers around a function: ``f(model, tanh(first(x)), *rest)``, then `last`."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.f = f

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return self.f(self, torch.tanh(self.first(x)), *rest, **named)


def batch(size: int = BATCH, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(size, *(shape or (D,))).requires_grad_(grad)
