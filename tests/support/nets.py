"""Small nets in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

REMATS = ("none", "full", "min-cut")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linears(count: int = 5) -> nn.Sequential:
    """Linear maps and nothing in between: every cut is as good as another."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(count))).double()


class Pair(nn.Module):
    """Two tensors in, two out, the second of which did nothing for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = pair
        return torch.tanh(self.first(x)), self.second(y)


class Meet(nn.Module):
    """Two tensors in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.of_both = nn.Bilinear(6, 6, 6)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.of_both(*pair)


class Part(nn.Module):
    """One tensor in; three out: a value, what is not a tensor, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int, None]:
        return torch.tanh(self.layer(x)), 7, None


def twice() -> nn.Sequential:
    """One layer that stands in two places."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), layer, nn.Tanh())


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))),
        nn.ModuleDict({"only": nn.Sequential(nn.GELU(), nn.Linear(8, 4))})["only"],
        nn.Sequential(nn.Tanh(), nn.Linear(4, 3)),
    )


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten()
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "linears": (linears, lambda n: random(n, 6)),
    "nested": (nested, lambda n: random(n, 6)),
    "a layer in two places": (twice, lambda n: random(n, 6)),
    "convolutions": (convolutions, lambda n: random(n, 2, 8, 8)),
    "pairs": (
        lambda: nn.Sequential(Pair(), Pair(), Pair()),
        lambda n: (random(n, 6), random(n, 6) * 2),
    ),
    "pairs that meet": (
        lambda: nn.Sequential(Pair(), Meet(), nn.Tanh(), nn.Linear(6, 2)),
        lambda n: (random(n, 6), random(n, 6) * 2),
    ),
    "values that are no tensors": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Part()),
        lambda n: random(n, 6),
    ),
    "whole numbers in": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)),
        lambda n: torch.arange(n * 3).view(n, 3) % 9,
    ),
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().double()
