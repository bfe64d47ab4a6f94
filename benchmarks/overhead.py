"""One stage, one micro-batch, nothing rematerialized: what does the pipeline itself cost?

    python -m benchmarks.overhead

GPT-2 (12 layers, d 256, sequence 128, batch 8), a training step without the optimizer. Eager and
pipeline steps alternate in one process; the ratio of medians is the figure (bar: 1.05).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import autopipe
from autopipe.runtime.backends import accelerators, backend_of
from benchmarks.models import gpt2


def seconds(step: Callable[[], None], device: torch.device) -> float:
    backend = backend_of(device)
    backend.synchronize(device)
    start = time.perf_counter()
    step()
    backend.synchronize(device)
    return time.perf_counter() - start


def main(rounds: int = 15, device: torch.device | None = None) -> None:
    if device is None:
        (device,) = accelerators()[:1] or (torch.device("cpu"),)
    model, inputs = gpt2(layers=12, width=256, heads=4, sequence=128)
    model.to(device)
    batch = {name: x.to(device) for name, x in inputs(8).items()}
    pipe = autopipe.compile(model, devices=[device], chunks=1, remat="none", kwargs=batch)

    def step(module: torch.nn.Module) -> None:
        module(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(3):
        step(model)
        step(pipe)
    eager, ours = [], []
    for _ in range(rounds):
        eager.append(seconds(lambda: step(model), device))
        ours.append(seconds(lambda: step(pipe), device))
    a, b = statistics.median(eager), statistics.median(ours)
    print(f"device {device}, threads {torch.get_num_threads()}")
    print(f"eager {a * 1e3:.1f} ms, pipeline {b * 1e3:.1f} ms, ratio {b / a:.3f} (bar 1.05)")


if __name__ == "__main__":
    main()
