"""torchgpipe with the loss in its last layer, and with the loss outside.

Its CPU partitions share one thread ("cpu:1" means "cpu" to it), and autograd runs their backwards
in the caller's: on the CPU it is no pipeline, only micro-batches.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rounds import Side
from benchmarks.step_cases import Case


class Carry(nn.Module):
    """A layer that passes the target on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, target = both
        return self.layer(x), target


class CarriedLoss(nn.Module):
    """The last layer: the loss of a micro-batch, with one dimension, so that they gather."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(*both).reshape(1)  # type: ignore[no-any-return]


def torchgpiped(case: Case, chunks: int, split: int, *, inside: bool) -> Side:
    """A side that trains with torchgpipe, without checkpoints.

    Args:
        case: what to train; its parameters are used, and get the gradients.
        chunks: micro-batches.
        split: layers of the first partition.
        inside: whether the loss is the last layer.

    Raises:
        ImportError: torchgpipe is not installed.
    """
    from torchgpipe import GPipe

    layers = list(case.layers)
    if inside:
        layers = [*map(Carry, layers), CarriedLoss(case.loss)]
    pipe = GPipe(
        nn.Sequential(*layers),
        [split, len(layers) - split],
        devices=["cpu", "cpu"],
        chunks=chunks,
        checkpoint="never",
    )

    def step() -> float:
        case.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = (
            pipe((case.x, case.target)).mean() if inside else case.loss(pipe(case.x), case.target)
        )
        torch.autograd.backward(loss)
        return time.perf_counter() - start

    return step
