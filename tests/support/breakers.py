"""A net in which a test says what is done with the layers, and what crosses between its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import autopipe
from autopipe.report.stages import BoundaryTensor
from tests.support.agreement import assert_agrees, pipelined
from tests.support.plans import plan_at

WIDTH, BATCH, STAGES, CHUNKS = 6, 7, 3, 3
REMATS = ("none", "full", "min-cut")
Body = Callable[..., Any]


class Net(nn.Module):
    """Four layers, a matrix, a buffer and a constant, used as `body` says."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.matrix = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.register_buffer("vector", torch.rand(WIDTH))
        self.body = body
        self.double()
        self.constant = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.body(self, *args, **kwargs)

    def deep(self, x: Tensor, first: int = 0) -> Tensor:
        """Through the layers from `first` on."""
        for layer in self.layers[first:]:
            x = torch.tanh(layer(x))
        return x


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def sample(seed: int = 1) -> Tensor:
    """Two of them have equal shapes, so that to swap them goes unnoticed."""
    return random(BATCH, WIDTH, seed=seed).requires_grad_()


def piped(
    body: Body, *args: Any, remat: str = "full", starts: Sequence[str] = (), **kwargs: Any
) -> autopipe.Pipeline:
    """Three stages, three uneven micro-batches; compared with eager.

    `starts`: the calls at which the last two stages start, if that matters.
    """
    plan = plan_at(starts, Net(body), CHUNKS, *args, remat=remat, **kwargs) if starts else None
    pipe = pipelined(Net(body), devices=STAGES, chunks=CHUNKS, remat=remat, plan=plan)
    assert_agrees(pipe, *args, **kwargs)
    return pipe


def crossing(pipe: autopipe.Pipeline) -> list[tuple[BoundaryTensor, Tensor]]:
    """What stages send one another, with a (fake) tensor that looks like it."""
    found = []
    for stage in pipe.stages:
        (output,) = [n for n in stage.graph_module.graph.nodes if n.op == "output"]
        nodes: tuple[fx.Node, ...] = output.args[0]
        found += [(b, n.meta["val"]) for b, n in zip(stage.outputs, nodes, strict=True)]
    return [(b, value) for b, value in found if b.targets]
