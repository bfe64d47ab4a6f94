"""Threads that workers keep, beside threads that are made for each forward and each backward.

    python -m benchmarks.kept_threads [rounds]

Two stages of one number each, GPipe, nothing rematerialized: a step is nearly all overhead. The two
alternate in one process, 400 steps a side; median of the rounds' medians, and of their ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

import autopipe
from autopipe.runtime import workers

STEPS = 400

run_workers = workers.run_workers


def anew(tasks: Any, abort: Any, cores: Any, kept: Any = None) -> None:
    """Run workers in threads of this call only."""
    run_workers(tasks, abort, cores)


def seconds(pipe: nn.Module, x: torch.Tensor, run: Any) -> float:
    """The median of a step's seconds."""
    workers.run_workers = run
    found = []
    try:
        for _ in range(STEPS):
            start = time.perf_counter()
            pipe(x).sum().backward()
            found.append(time.perf_counter() - start)
    finally:
        workers.run_workers = run_workers
    return statistics.median(found)


def main(rounds: int = 7) -> None:
    torch.set_num_threads(1)
    for chunks in (1, 2, 8):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        x = torch.ones(chunks, 1)
        pipe = autopipe.compile(model, ["cpu"] * 2, chunks, remat="none", args=(x,))
        for run in (run_workers, anew):
            seconds(pipe, x, run)
        pairs = [(seconds(pipe, x, run_workers), seconds(pipe, x, anew)) for _ in range(rounds)]
        kept, made = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"M = {chunks}: kept {1e3 * kept:.2f} ms, anew {1e3 * made:.2f} ms, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
