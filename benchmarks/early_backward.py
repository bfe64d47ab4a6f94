"""How long a step takes under each schedule: two stages on two cores, the loss in the model.

    python -m benchmarks.early_backward

The transformer of `benchmarks.models` (8 layers, d 512, sequence 128, vocabulary 8192, batch 16), a
training step without the optimizer, one thread per worker. The schedules' steps alternate in one
process; medians. Beside each, what the plan predicts relative to 1f1b. Then the bytes that stages
save between phases at most: four stages, 16 micro-batches, a smaller transformer.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import autopipe
from benchmarks.models import transformer

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-h2")


class WithLoss(nn.Module):
    """The model and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.model(tokens)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def measure(chunks: int, remat: str, rounds: int = 7) -> None:
    """Print the median seconds of a step under each schedule."""
    torch.manual_seed(0)
    model, tokens, labels = WithLoss(transformer()), *torch.randint(8192, (2, 16, 128))
    pipes = {
        kind: autopipe.compile(model, devices=2, chunks=chunks, schedule=kind, remat=remat)
        for kind in SCHEDULES
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in SCHEDULES}
    for turn in range(rounds + 2):
        for kind, pipe in pipes.items():
            start = time.perf_counter()
            pipe(tokens, labels).backward()
            if turn > 1:
                seconds[kind].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    base = statistics.median(seconds["1f1b"])
    planned = pipes["1f1b"].plan.timeline.makespan
    for kind, pipe in pipes.items():
        found = statistics.median(seconds[kind])
        print(
            f"M = {chunks}, remat {remat:5} {kind:6} {found:.3f} s, {base / found:.3f} x 1f1b"
            f" (planned {planned / pipe.plan.timeline.makespan:.3f})"
        )


def saved(remat: str) -> None:
    """Print the most KiB that each stage saves under each schedule, measured and planned."""
    torch.manual_seed(0)
    model = WithLoss(transformer(layers=8, width=64, sequence=32, vocabulary=256))
    tokens, labels = torch.randint(256, (2, 32, 32))
    for kind in SCHEDULES:
        pipe = autopipe.compile(model, devices=4, chunks=16, schedule=kind, remat=remat)
        pipe(tokens, labels).backward()
        measured = [round(stage.peak / 1024) for stage in pipe.memory.stages]
        planned = [round(stage.peak_saved_bytes / 1024) for stage in pipe.plan.stages]
        print(f"saved, remat {remat:5} {kind:6} measured {measured} planned {planned} KiB")


def main() -> None:
    torch.set_num_threads(1)
    for remat in ("none", "full"):
        saved(remat)
    for chunks, remat in ((4, "none"), (8, "none"), (16, "none"), (4, "full")):
        measure(chunks, remat)


if __name__ == "__main__":
    main()
