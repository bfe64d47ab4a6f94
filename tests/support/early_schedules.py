"""Models with a loss, and their training steps under a schedule."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autopipe
from autopipe.passes.schedule import KINDS

EARLY = [kind for kind in KINDS if kind != "gpipe"]
"""The schedules whose backwards start before all forwards have ended."""


class WithLoss(nn.Module):
    """A model that returns one loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self.model(*args, **kwargs)
        if isinstance(result, dict) and result.get("loss") is not None:
            own: Tensor = result["loss"]
            return own
        values = [
            x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad
        ]
        return torch.stack([x.square().mean() for x in values]).sum()


def step(model: nn.Module, inputs: Any, **options: Any) -> dict[str, Tensor | None]:
    """Loss, gradients and buffers after one training step of a copy of a model."""
    model = copy.deepcopy(model)
    pipe = autopipe.compile(model, **options)
    args, kwargs = inputs
    torch.manual_seed(3)
    loss = pipe(*args, **kwargs)
    loss.backward()
    found: dict[str, Tensor | None] = {"loss": loss.detach()}
    found |= {n: p.grad for n, p in model.named_parameters()}
    return found | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            assert value is other, name
        else:
            assert torch.equal(other, value), name


class Layers(nn.Module):
    """Layers with dropout and a mean over the labels that count."""

    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), 0.2, self.training)
        return F.cross_entropy(x, labels, ignore_index=-1)


def batch(samples: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(samples)
    labels = torch.randint(-1, 6, (samples,))
    labels[: samples // 3] = -1  # micro-batches with nothing to count
    return torch.randn(samples, 6), labels
