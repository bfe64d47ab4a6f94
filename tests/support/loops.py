"""A training loop run twice: on a pipeline, and on a copy of its model in eager torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autopipe
from tests.support.agreement import assert_close, pipelined

Loop = Callable[[nn.Module], Any]


class Net(nn.Module):
    """A little of everything that optimizers treat apart: a table, norms, biases, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.last_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + torch.tanh(self.first(self.norm(x)))
        x = x + torch.tanh(self.second(self.drop(x)))
        return self.head(self.last_norm(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def ids(step: int = 0, batch: int = 7) -> Tensor:
    return torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(step))


def loss_of(module: nn.Module, step: int = 0, batch: int = 7) -> Tensor:
    """Next-token prediction, as one writes it: the loss is computed outside of the model."""
    x = ids(step, batch)
    return F.cross_entropy(module(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def train(module: nn.Module, steps: int = 3) -> list[Tensor]:
    """The plainest of loops; its losses."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(loss_of(module, step))
        losses[-1].backward()
        optimizer.step()
    return losses


def assert_same_state(pipe: nn.Module, reference: nn.Module) -> None:
    """Parameters, gradients and buffers."""
    pairs = list(zip(pipe.named_parameters(), reference.parameters(), strict=True))
    assert pairs
    for (name, p), q in pairs:
        assert_close(p.detach(), q.detach(), name)
        assert_close(p.grad, q.grad, f"gradient of {name}")
        assert p.requires_grad == q.requires_grad
    for (name, a), b in zip(pipe.named_buffers(), reference.buffers(), strict=True):
        assert_close(a, b, name)


def alike(
    loop: Loop,
    model: nn.Module | None = None,
    reference: nn.Module | None = None,
    **options: Any,
) -> autopipe.Pipeline:
    """Run a loop on a pipeline and on a copy of its model: what it returns and leaves agrees.

    Args:
        loop: is given the pipeline or the model.
        model: `net()` unless given.
        reference: its copy, for models that cannot be copied.
        options: of `autopipe.compile`.
    """
    model = net() if model is None else model
    reference = copy.deepcopy(model) if reference is None else reference
    pipe = pipelined(model, **options)
    found, expected = loop(pipe), loop(reference)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(b, Tensor):
            assert_close(a.detach(), b.detach())
        elif isinstance(b, float):
            assert a == pytest.approx(b, rel=1e-12, nan_ok=True)
        else:
            assert a == b
    assert_same_state(pipe, reference)
    return pipe
