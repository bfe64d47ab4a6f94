"""When CPU workers should share a core: steps on one core for all, and on one for each.

    python -m benchmarks.small_ops

Transformer layers of growing width, two stages, M = 4, 1f1b, one thread per operator. Both ways
alternate; medians of 21. `mean op` is what `traced_programs` compares with `SMALL_OP`.
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch
from torch import Tensor, nn

import autopipe
from autopipe import traced_programs
from autopipe.passes.cost import mean_op_seconds
from autopipe.passes.devices import CPU_CORE

SIZES = ((16, 8, 8), (32, 16, 16), (64, 16, 16), (64, 32, 16), (96, 32, 16), (128, 32, 32))
"""Width, samples, sequence length."""


class Layers(nn.Module):
    """Four layers and a loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def compare(width: int, samples: int, length: int) -> None:
    """Print one row."""
    x = torch.randn(samples, length, width)
    pipes = {}
    for name, limit in (("a core each", 0.0), ("one core", 1.0)):
        with mock.patch.object(traced_programs, "SMALL_OP", limit):
            pipe = autopipe.compile(Layers(width), ["cpu"] * 2, 4, schedule="1f1b", remat="none")
            pipe(x).backward()
        pipes[name] = pipe
    phased = pipes["one core"]._programs.last[1].lowered.phased.values()
    mean = max(mean_op_seconds(cut.stages, CPU_CORE) for cut in phased)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(23):
        for name, pipe in pipes.items():
            pipe.zero_grad()
            start = time.perf_counter()
            pipe(x).backward()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    each, one = (1e3 * statistics.median(seconds[name]) for name in pipes)
    print(
        f"d {width}, {samples} × {length}: mean op {1e6 * mean:.1f} µs, a core each {each:.1f} ms,"
        f" one core {one:.1f} ms, {one / each:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    for size in SIZES:
        compare(*size)
