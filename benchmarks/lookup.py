"""How long a call takes to find its program, for a model of 300 parameters.

``python -m benchmarks.lookup``
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import autopipe


class Block(nn.Module):
    """A residual block with six parameters and an attribute that its forward reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(self.norm(x)).relu()) * self.scale


def medians(function: Callable[[], object], calls: int) -> float:
    """The median of nine rounds, in µs a call."""
    rounds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)


def main() -> None:
    torch.set_num_threads(1)
    model, x = nn.Sequential(*[Block(8) for _ in range(50)]), torch.randn(4, 8)
    pipe = autopipe.compile(model, devices=1, chunks=2)
    pipe(x).sum().backward()
    print(f"{sum(1 for _ in model.parameters())} parameters, 1 thread")
    print(f"find the program: {medians(lambda: pipe.capture(x), 50):,.0f} µs")
    print(f"step: {medians(lambda: pipe(x).sum().backward(), 5):,.0f} µs")


if __name__ == "__main__":
    main()
