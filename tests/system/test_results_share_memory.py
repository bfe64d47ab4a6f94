"""Results that share memory with an input, a buffer or another result, changed in place afterwards.

Covers batch/aliases.py. Truth is the model itself: the same change of the same result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from tests.support.agreement import assert_close

pytestmark = pytest.mark.usefixtures("alike_models_once")


class Model(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("n", torch.zeros(4, dtype=torch.float64))
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x, self.layer(x).sin())


def counts(s: Any, x: Tensor, h: Tensor) -> Any:
    s.n.add_(1)
    return h, s.n


def counts_and_views(s: Any, x: Tensor, h: Tensor) -> Any:
    s.n.add_(1)
    return h, s.n.view(2, 2)[0]


FORWARDS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a buffer": lambda s, x, h: (h + s.n, s.n),
    "a view of a buffer": lambda s, x, h: (h + s.n, s.n[1:3]),
    "a buffer for every sample": lambda s, x, h: (h, s.n.expand(x.shape[0], 4)[0]),
    "a written buffer": counts,
    "a view of a written buffer": counts_and_views,
    "an input": lambda s, x, h: (h, x),
    "a slice of an input": lambda s, x, h: (h, x[:, 1:]),
    "a sample of an input": lambda s, x, h: (h, x[0]),
    "a detached input": lambda s, x, h: (h, x.detach()),
    "an input that is of this dtype": lambda s, x, h: (h, x.double()),
    "an input in the shape of another": lambda s, x, h: (h, x.view_as(h)),
    "a flattened input": lambda s, x, h: (h, x.flatten()),
    "a transposed parameter": lambda s, x, h: (h, s.layer.weight.t()),
    "a slice of a result": lambda s, x, h: (h, h[:, 0]),
    "a result, and what it is a slice of": lambda s, x, h: (h[:, :2], h),
    "a view of a view of a result": lambda s, x, h: (h, h.view(-1, 2, 2).transpose(1, 2)[:, 0]),
    "a detached result": lambda s, x, h: (h, h.detach()),
    "a detached loss": lambda s, x, h: (F.mse_loss(h, x), h, F.mse_loss(h, x).detach()),
    "a mean and a part of it": lambda s, x, h: (m := h.mean(0), m[1:3]),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_change_of_a_result_is_seen_where_the_model_shows_it(name: str) -> None:
    model = Model(FORWARDS[name])
    twin = copy.deepcopy(model)
    pipe = autopipe.compile(model, 1, 3)
    for which in (0, -1):
        seen = []
        for run in (pipe, twin):
            x = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4)
            results = run(x)
            with torch.no_grad():
                results[which].mul_(3).add_(1)
            seen.append([*results, x, *model.buffers()] if run is pipe else [*results, x, twin.n])
            seen[-1] += [run(x)[0], (model if run is pipe else twin).layer.weight]
        for found, expected in zip(*seen, strict=True):
            assert_close(found, expected)


@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_pass_through_both(name: str) -> None:
    model = Model(FORWARDS[name])
    twin = copy.deepcopy(model)
    pipe = autopipe.compile(model, 1, 3)
    seen, asked = [], []
    for run, owner in ((pipe, model), (twin, twin)):
        x = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4).requires_grad_()
        results = run(x)
        wanted = [r for r in results if r.requires_grad]
        sum((r * torch.arange(r.numel()).view(r.shape)).sum() for r in wanted).backward()
        seen.append([x.grad, owner.layer.weight.grad])
        asked.append([r.requires_grad for r in results])
    assert asked[0] == asked[1]
    for found, expected in zip(*seen, strict=True):
        assert_close(found, expected)
